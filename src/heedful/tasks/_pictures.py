"""A task from pictures of the user's own in a folder for each class: what is it?"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from heedful.adapters.wrapped import device_of
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.files import file_digest
from heedful.core.kinds.tokens import Prompt
from heedful.diagnosis.images import ENDINGS, opened, pixels_of, processor_of
from heedful.diagnosis.texts import files_in
from heedful.explaining.aim import read_by
from heedful.shown import Shown
from heedful.tasks._own import Given, unbound
from heedful.tasks._ridge import Ridge
from heedful.tasks.task import Choice, Item, Tokenizer
from heedful.text_models import features

TRAIN, TEST = "train", ("test", "validation", "val", "valid")  # folders of a data set that is parted already


@dataclass(frozen=True)
class Picture:
    """A picture, and what it shows."""

    name: str  # of its file, within the folder
    kind: str  # the class
    digest: str
    fits: bool | None = None  # whether it is there to fit a head on, where the user parted them


@dataclass(frozen=True, eq=False)
class Seeing:
    """What the task knows of the model that is asked."""

    numbers: dict[str, int]  # of the classes, in the model's or the head's logits
    classes: int  # that there are logits of
    head: Ridge | None  # of an encoder without one
    tokens: int  # that stand for a picture


class OwnPictures(Given, Choice):
    """Pictures of the user's own; the likeliest of all classes that the model has logits of must be the folder's name.

    An encoder without classes gets a head: a ridge regression from its features, the first token beside the mean of
    all, onto the classes, fitted to the unedited model on half of each class (or on the folder `train`, where there is
    one beside `test`), and asked about the rest. It is the same under every method.
    """

    name = "own pictures"
    about = "Names what pictures of your own show, by their folders."
    seeing: Seeing | None = None

    def require(self, model: Any, tokenizer: Any) -> None:
        if read_by(model) != "image":
            raise RefusedModel(
                f"{self.title} holds pictures to name, and {type(model).__name__} is not a model that reads a picture "
                "alone; name an image classifier or an encoder: heedful compare vision"
            )
        processor_of(tokenizer, "compare()")
        if classifies(model):
            self._numbers(model)

    def _numbers(self, model: Any) -> dict[str, int]:
        """The number that a classifier has for each folder's name."""
        known: dict[str, set[int]] = {}
        for number, label in model.config.id2label.items():
            for spelling in {str(number), label, *label.split(",")}:
                known.setdefault(_plain(spelling), set()).add(int(number))
        kinds = sorted({row.kind for row in self.rows})
        if strange := [kind for kind in kinds if len(known.get(_plain(kind), ())) != 1]:
            why = "more than one class" if _plain(strange[0]) in known else "no class"
            some = ", ".join(str(label) for label in list(model.config.id2label.values())[:3])
            rule = (
                f"{strange[0]!r} names {why} of {type(model).__name__}, whose classes are {some}, ...; name folders as "
                "the model does, or by number, or compare its encoder, for which a head is fitted"
            )
            raise FieldError("compare()", "tasks", self.source, rule, some.partition(",")[0])
        return {kind: next(iter(known[_plain(kind)])) for kind in kinds}

    def on(self, model: Any, tokenizer: Any) -> Self:
        processor, device = processor_of(tokenizer), device_of(model)
        fitted, asked, left_out = self._parted(alone=classifies(model))

        @torch.no_grad()
        def seen(row: Picture, **more: Any) -> Any:
            return model(pixel_values=self._pixels(row, processor).to(device, model.dtype), **more)

        if classifies(model):
            numbers, classes, head = self._numbers(model), len(model.config.id2label), None
        else:
            numbers = {kind: i for i, kind in enumerate(sorted({row.kind for row in fitted}))}
            kinds = torch.tensor([numbers[row.kind] for row in fitted])
            found = torch.cat([features(_states(model, seen(row))).cpu() for row in fitted])
            classes, head = len(numbers), Ridge.fit(found, kinds)
        begun = getattr(seen(asked[0], output_hidden_states=True), "hidden_states", None)
        tokens = begun[0].shape[1] if begun else 1
        return replace(self, rows=asked, left_out=left_out, seeing=Seeing(numbers, classes, head, tokens))

    def _parted(self, alone: bool) -> tuple[tuple[Picture, ...], tuple[Picture, ...], tuple[str, ...]]:
        """Pictures to fit a head on, those that are asked, and what was left out; a model `alone` needs no head."""
        parted = any(row.fits is not None for row in self.rows)
        fitted = [row for row in self.rows if row.fits]
        asked = [row for row in self.rows if not row.fits]
        left_out = list(self.left_out)
        if not alone and not parted:
            fitted, asked = [], []
            for kind in sorted({row.kind for row in self.rows}):
                mine = [row for row in self.rows if row.kind == kind]
                random.Random(f"{self.name} {kind}").shuffle(mine)
                fitted += mine[: len(mine) // 2]
                asked += mine[len(mine) // 2 :] if len(mine) > 1 else []
                if len(mine) == 1:
                    left_out.append(f"{kind}: has one picture, and a head is fitted on one and asked about another")
        if not alone and len({row.kind for row in fitted}) < 2:
            rule = "a head needs two classes or more with pictures to fit it on" + "".join(f"; {x}" for x in left_out)
            raise FieldError("compare()", "tasks", self.source, rule, "folders of two pictures or more")
        known = {row.kind for row in fitted}
        strange = [] if alone else sorted({row.kind for row in asked} - known)
        left_out += [f"{kind}: has no pictures in {TRAIN!r} to fit a head on" for kind in strange]
        asked = [row for row in asked if row.kind not in strange]
        if not asked:
            raise FieldError("compare()", "tasks", self.source, "leaves no picture to ask about", "more pictures")
        return tuple(fitted), tuple(asked), tuple(left_out)

    def _pixels(self, row: Picture, processor: Any) -> Tensor:
        """What the model is given of a picture, `[1 c rows cols]`."""
        found, why = pixels_of(Path(self.source) / row.name, processor)
        if why:
            raise FieldError("compare()", "tasks", row.name, f"{why}: take it out", "files that can be read")
        return found[0][None]

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        known = self.seeing
        if known is None:
            raise unbound(self)
        row = self.rows[self.place(tokenizer, number, seed)]
        right = known.numbers[row.kind]
        options = tuple((i,) for i in (right, *(i for i in range(known.classes) if i != right)))
        shown = Shown({"pixel_values": self._pixels(row, processor_of(tokenizer))}, "image", head=known.head)
        return Item(Prompt((0,) * known.tokens), options, labels={"class": row.kind}, shown=shown)


def classifies(model: Any) -> bool:
    """Whether a model has logits of classes."""
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    names = {name for each in found for name in (each if isinstance(each, tuple) else (each,))}
    return type(model).__name__ in names


def _states(model: Any, seen: Any) -> Tensor:
    """What an encoder makes of each token of a picture, `[1 n e]`."""
    states: Tensor | None = getattr(seen, "last_hidden_state", None)
    if states is None or states.ndim != 3:
        raise RefusedModel(
            f"{type(model).__name__} names no classes, and tells no states of a picture's tokens, to which a head "
            "could be fitted; name an image classifier or an encoder: heedful compare vision"
        )
    return states


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ").split())


def pictures(folder: Path) -> list[tuple[str, Picture | str]]:
    """The pictures of a folder with their classes, or why one cannot be asked."""
    found = list(_each(folder))
    kinds = {row.kind for _, row in found if isinstance(row, Picture)}
    if len(kinds) == 1:
        return [(kinds.pop(), "is the only folder with pictures, and there must be two or more, each a class")]
    return found


def _each(folder: Path) -> Iterator[tuple[str, Picture | str]]:
    asked = next((name for name in TEST if (folder / name).is_dir()), None)
    parted = asked is not None and (folder / TRAIN).is_dir()
    for file in files_in(folder, ENDINGS):
        place = file.relative_to(folder)
        if parted and place.parts[0] not in (TRAIN, asked):
            yield str(place), f"is neither in {TRAIN!r} nor in {asked!r}"
            continue
        if len(place.parts) < 2 + parted:
            yield str(place), "lies in no folder that names its class"
            continue
        _, why = opened(file)
        fits = place.parts[0] == TRAIN if parted else None
        yield str(place), why or Picture(str(place), place.parts[parted], file_digest(file)[:16], fits)
