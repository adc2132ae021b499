"""mean of A over words that are no magnets: words behind a prompt that mean nothing take what belongs to no word."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from heedful.authoring import Call, Cat, Method, Paper, Readings, RoleName, Site, reads
from heedful.core.regions import by_text, numbers


class RefAM(Method):
    """Where in a picture the thing is that words refer to: `run[method]` has a map of places `[b n]` for each forward.

    Hand a diffusion model the picture, noised, and `method.appended(text)`: behind the text stand stop words, which
    draw what places give to no word. Roles name the words that refer, without stop words; maps of all others are left
    out. In joint attention a role names the picture's places too.
    """

    paper = Paper(
        "P305",
        "RefAM: Attention Magnets for Zero-Shot Referral Segmentation",
        "Anna Kukleva, Enis Simsar, Alessio Tonioni, Muhammad Ferjad Naeem, Federico Tombari, Jan Eric Lenssen, "
        "Bernt Schiele",
        2025,
        "2509.22650",
        differs=(
            "Read off the paper's abstract and the authors' project page; neither equations nor code could be had.",
            "By which rule a word is a global sink is ours: it gets so much more than an even share from whoever gives "
            "it least. It is left out in the layers where it is one.",
            "Which words are nouns, words that tell a side, and the mask that a segmenter draws around the highest "
            "place are left to the caller, as are captions that a language model writes.",
        ),
    )
    whole_map = True
    subjects = ("cross",)
    words: RoleName = "marked"  # the words that refer, among the keys
    places: str = ""  # the picture's tokens, in joint attention; "": all queries of cross-attention
    magnets: tuple[str, ...] = (".", "a", "with")  # stand behind the prompt; the authors: these
    sinks: Annotated[float, Ge(1)] = 10.0  # a word is one above so many even shares from each token; ours

    def appended(self, text: str) -> str:
        return " ".join([text, *self.magnets])

    @reads(Site.PATTERN)
    def look(self, pattern: Tensor, call: Call) -> Cat | None:
        if call.cross == bool(self.places):
            return None
        mean, asks = pattern.detach().mean(1), call.is_text[:, 0, :, None]  # [b q k], [b|1 q 1]
        least = mean.masked_fill(~asks, 1.0).amin(1)  # [b k]
        there = (call.k_pos[:, 0] >= 0).sum(-1, keepdim=True)
        kept = (call.marked(self.words)[:, 0] & (least * there <= self.sinks)).to(mean.dtype)
        heat = (mean @ kept[..., None])[..., 0] / kept.sum(-1, keepdim=True).clamp(min=1)
        if self.places:
            number = by_text(numbers, call.regions(self.places), call.q_pos)[:, 0, :, None]
            laid = number == torch.arange(call.region(self.places).tokens, device=number.device)
            heat = (laid.to(heat.dtype).mT @ heat[..., None])[..., 0]
        return Cat.of(f"{call.forward:06d}", heat)

    def answer(self, readings: Readings) -> list[Tensor]:
        """One map `[b n]` for each forward, in their order, the mean of the layers that it is attached to."""
        found: dict[str, list[Tensor]] = {}
        for stat in readings.values():
            for name, x in stat.tensors().items():
                found.setdefault(name, []).append(x)
        return [torch.stack(found[name]).mean(0) for name in sorted(found)]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (1, 12))
    method = RefAM()
    print(method.appended("the red square"))
    with torch.no_grad(), attach(model, method, roles={"marked": ((1, 3),)}) as run:
        run(input_ids=ids, decoder_input_ids=ids)
        print(run[method][0])
