"""VAR on pictures: does weight taken from sinks and given to the image make a model say what is in the picture?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from claims._loaded import default
from claims._seeing import LANGUAGE, SEEN, Shown, in_picture, joined, shown, told
from claims._texts import apart
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.authoring import Call, Method, Site, reads
from heedful.core.entry import Readings
from heedful.core.stats import Mean
from heedful.methods import VAR

PICTURES = 10
BEHIND = " are the colours in the picture, and the thing is"
LAYERS = range(LANGUAGE[1], LANGUAGE[29])  # of 30; the first only looks for sinks, as in the authors' code


def setting(pictures: int) -> str:
    return (
        f"{SEEN}. {pictures} pictures a seed of two things in two colours stand first in the prompt, so that there are "
        "sinks among their tokens; behind text, and in the small model that was trained from nothing, there are none."
    )


class _Drawn(VAR):
    """The control: as many tokens are taken for sinks, drawn at random."""

    def massive(self, stream: Tensor) -> Tensor:
        found = super().massive(stream)
        return found.gather(1, torch.rand(found.shape).argsort(1))


class _Sunk(Method):
    """What the prompt's last token gives to the image and to sinks in it, and in how many heads VAR would act."""

    by: VAR

    @reads(Site.RESIDUAL)
    def find(self, stream: Tensor, call: Call) -> None:
        call.state.forward["sinks"] = self.by.massive(stream)

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Mean | None:
        last, sinks = weights[:, :, -1], call.state.forward.get("sinks")
        if sinks is None:
            return None
        image = call.marked(self.by.role)[:, :, None]
        mine = (image[:, 0] & sinks[:, None]).expand_as(last)
        given, sunk = (last.masked_fill(~where, 0.0).sum(-1) for where in (image[:, 0].expand_as(last), mine))
        acts = (given >= self.by.least) & (sunk <= self.by.rho * given)
        count = mine[:, :1].double().sum(-1).expand(-1, last.shape[1])
        each = torch.stack([count, given.double(), sunk.double(), acts.double()], -1)
        return Mean.of(each.flatten(0, 1).sum(0), each.shape[0] * each.shape[1])

    def answer(self, readings: Readings) -> Tensor:
        return torch.stack(readings.values_by_layer).mean(0)


def fitted(seed: int) -> VAR:
    """The authors' settings; dimensions that are massive in first tokens of texts."""
    loaded = default()
    texts = [loaded.tokenizer(text, return_tensors="pt") for text in apart(seed, 2, 40, fitting=True)]
    return replace(fit(VAR(), loaded.model, texts), role="image")


@torch.no_grad()
def sunk(model: object, item: Shown, method: VAR) -> dict[str, float]:
    """Whether there is what the method speaks of, in the layers where it acts."""
    reader = _Sunk(method).on(layers=LAYERS)
    with attach(model, reader, roles=item.roles) as attached:
        attached(**item.inputs)
        names = ("sinks among 64 image tokens", "weight on the image", "weight on its sinks", "heads that heed it")
        return dict(zip(names, attached[reader].tolist(), strict=True))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, item, method = joined(seed), shown(seed, PICTURES, "", BEHIND), fitted(seed)
    ways = {
        "without": None,
        "VAR": method.on(layers=LAYERS),
        "from drawn tokens": _Drawn("image", dims=method.dims).on(layers=LAYERS),
        "in every head": replace(method, rho=1.0, least=0.0).on(layers=LAYERS),
    }
    numbers = sunk(model, item, method)
    for name, way in ways.items():
        found = in_picture(told(model, item, way), item.there)
        numbers |= {f"{what}, {name}": x for what, x in found.items()}
    best = max(numbers["log-probability, without"], numbers["log-probability, from drawn tokens"])
    return numbers["log-probability, VAR"] - best, numbers


CLAIM = Claim(
    key="P016_sight",
    method="VAR",
    says="Weight taken from sinks and given to the image, in heads that look at it, makes a model heed the image.",
    paper_number="gains on general, hallucination and vision tasks, without training",
    setup=setting(PICTURES)
    + " How likely are the picture's colours among all four. The authors' settings, massive dimensions fitted on "
    "texts; against no edit and as many tokens drawn for sinks, whichever is better. Details: how many sinks there "
    "are, what they are given, and in what share of heads it acts; every head.",
    effect="log-probability of the picture's colours among four, over no edit or drawn sinks",
    measure=measure,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
