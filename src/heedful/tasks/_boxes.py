"""A task of boxes in pictures of the user's own: is that where a model looks when it is asked?"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.diagnosis.images import opened, processor_of
from heedful.looking import PICTURE
from heedful.tasks._looked import log_share, peaks, stand_for
from heedful.tasks._own import unbound
from heedful.tasks._pictured import AboutPictures, asked
from heedful.tasks._rows import Boxed
from heedful.tasks.task import Item, Sheet, Tokenizer

BOX = "box"  # the role of the picture's tokens that stand for the box


class PicturedBoxes(AboutPictures):
    """Questions about pictures, each with the box where the answer stands, and no answer.

    Where the last token of the prompt looks most, of all of the picture's, the mean over heads and layers, has to be in
    the box. A token stands for the box where at least half as much of its patch lies in it as of any other's.
    """

    name = "own picture boxes"
    about = "Looks most into the box where the answer to a question of your own about a picture stands."
    inside: tuple[tuple[bool, ...], ...] = ()  # of each row: which of the picture's tokens stand for the box

    @property
    def told(self) -> tuple[str, ...]:
        return ("its log-probability is that of the box: how much of the look at the picture falls into it",)

    def on(self, model: Any, tokenizer: Any) -> Self:
        """The same without boxes that the model is shown nothing of, or nothing else than."""
        rows, found, left_out = [], [], list(self.left_out)
        for row in self.rows:
            tokens = len(places(asked(row, tokenizer).prompt, PICTURE))
            inside = covered(row, tokenizer, tokens)
            if 0 < sum(inside) < tokens:
                rows.append(row)
                found.append(inside)
            else:
                what = "all" if any(inside) else "nothing"
                left_out.append(f"{row.image}, box {list(row.box)}: is {what} that the model is shown of the picture")
        if not rows:
            raise FieldError("compare()", "tasks", self.source, left_out[-1], "boxes that are a part of their picture")
        return replace(self, rows=tuple(rows), left_out=tuple(left_out), inside=tuple(found))

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        if not self.inside:
            raise unbound(self)
        place = self.place(tokenizer, number, seed)
        item = asked(self.rows[place], tokenizer)
        seen = zip(places(item.prompt, PICTURE), self.inside[place], strict=True)
        prompt = Prompt(item.prompt.tokens, {**item.prompt.roles, BOX: spans([at for at, yes in seen if yes])})
        return replace(item, prompt=prompt, shown=replace(item.shown, looks=True))

    def score(self, item: Item, sheet: Sheet) -> float:
        return peaks(sheet.looks, _within(item))

    def nats(self, item: Item, sheet: Sheet) -> float:
        return log_share(sheet.looks, _within(item))

    def chance(self, item: Item) -> float:
        return float(_within(item).double().mean())


def _within(item: Item) -> Tensor:
    """Which of the picture's tokens stand for the box."""
    box = set(places(item.prompt, BOX))
    return torch.tensor([place in box for place in places(item.prompt, PICTURE)])


def places(prompt: Prompt, role: str) -> list[int]:
    """The places of a role's tokens, in order."""
    return [place for span in prompt.spans(role) for place in range(*span)]


def spans(chosen: list[int]) -> tuple[tuple[int, int], ...]:
    """Places in order as spans."""
    ends = [i for i, (a, b) in enumerate(pairwise(chosen), 1) if b > a + 1]
    return tuple((chosen[a], chosen[b - 1] + 1) for a, b in pairwise([0, *ends, len(chosen)]))


def covered(row: Boxed, processor: Any, tokens: int) -> tuple[bool, ...]:
    """Which of the picture's tokens stand for the box: a white box on black is prepared as the picture is."""
    from PIL import Image, ImageDraw

    picture, why = opened(Path(row.file))
    if why:
        raise FieldError("compare()", "tasks", row.image, f"{why}: take it out", "files that can be read")
    black, white, boxed = (Image.new("RGB", picture.size, colour) for colour in ("black", "white", "black"))
    left, top, right, bottom = row.box
    ImageDraw.Draw(boxed).rectangle((left, top, right - 1, bottom - 1), fill="white")
    low, high, seen = (_pixels(image, processor) for image in (black, white, boxed))
    share = ((seen - low) / (high - low)).nan_to_num()  # what is padded is neither
    parts = _by_token(share, tokens)
    if parts is None:
        rule = f"is prepared as pixels {tuple(share.shape)} for {tokens} tokens, whose places are not known"
        raise FieldError("compare()", "tasks", row.image, rule, "a model that sees a picture as one grid")
    return tuple(stand_for(parts).tolist())


def _pixels(image: Any, processor: Any) -> Tensor:
    return torch.as_tensor(processor_of(processor)(images=image, return_tensors="pt")["pixel_values"]).double()


def _by_token(share: Tensor, tokens: int) -> Tensor | None:
    """The mean of pixels in the patches of each token; None where it is not known which these are."""
    if share.ndim == 2 and len(share) % tokens == 0:  # patches one after another, some of which make a token
        return share.view(tokens, -1).mean(-1)
    if share.ndim == 4 and len(share) == 1:
        rows = round(math.sqrt(tokens * share.shape[2] / share.shape[3]))
        if rows and tokens % rows == 0:
            return torch.nn.functional.adaptive_avg_pool2d(share[0].mean(0)[None], (rows, tokens // rows)).flatten()
    return None
