"""AttentionNMI: does attention that is called hybrid keep to the thing that a patch is of better than the rest?"""

from __future__ import annotations

import statistics
from functools import cache

import torch
from torch import Tensor

from claims._scenes import GRID, model, scenes
from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Call, Cat, Method, Site, reads
from heedful.methods.observe.attention_nmi import LABELS, AttentionNMI

SCENES, ASKED = 8, 8  # pictures a seed, and patches of the thing that are asked where they look in each
SEEN = AttentionNMI()


class _Maps(Method):
    """Keeps the maps among patches, for this experiment only."""

    paper = SEEN.paper

    @reads(Site.PATTERN)
    def keep(self, weights: Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.rows.start:06d}", weights[..., 1:, 1:])


def _precision(score: Tensor, right: Tensor) -> Tensor:
    """The average precision of rankings `[h q k]`, what is asked for in `right [q k]`, as means over queries `[h]`."""
    ranked = right.expand_as(score).gather(-1, score.argsort(dim=-1, descending=True)).double()
    found = ranked.cumsum(-1) / torch.arange(1, score.shape[-1] + 1)
    return ((found * ranked).sum(-1) / ranked.sum(-1)).mean(-1)


def _kept_to(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """How surely each head's attention, from patches of a thing, ranks the others of it first; and each head's NMI."""
    pictures, covered = scenes(draw, SCENES)
    with attach(model(), SEEN | _Maps(), backend="reference") as seen, torch.no_grad():
        seen(pixel_values=pictures)
        maps = [stat.value[0] for stat in seen[_Maps()].values()]
        nmi: Tensor = seen[SEEN].values
    found = []
    for number, thing in enumerate(covered):
        inside = thing.nonzero()[:, 0]
        asked = inside[torch.randperm(len(inside), generator=draw)[:ASKED]]
        others = ~torch.eye(GRID**2, dtype=torch.bool)[asked]
        right = thing.expand(len(asked), -1)[others].unflatten(0, (len(asked), -1))
        each = [layer[number][:, asked][:, others].unflatten(1, (len(asked), -1)) for layer in maps]
        found.append(torch.stack([_precision(score, right) for score in each]))
    return torch.stack(found).mean(0), nmi


@cache
def _even() -> float:
    """What the rankings of attention that is the same everywhere come to: the share of patches that are the thing's."""
    _, covered = scenes(torch.Generator().manual_seed(0), SCENES)
    return float(covered.float().mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    precision, nmi = _kept_to(torch.Generator().manual_seed(seed))
    named = torch.where(nmi < SEEN.low, 0, torch.where(nmi > SEEN.high, 2, 1))
    layers = torch.where(nmi.mean(1) < SEEN.low, 0, torch.where(nmi.mean(1) > SEEN.high, 2, 1))
    numbers = {"average precision by chance": _even()}
    for kind, label in enumerate(LABELS):
        numbers[f"{label} layers"] = float((layers == kind).sum())
        numbers[f"{label} heads"] = float((named == kind).sum())
        if bool((layers == kind).any()):
            numbers[f"average precision, {label} layers"] = float(precision[layers == kind].mean())
        if bool((named == kind).any()):
            numbers[f"average precision, {label} heads"] = float(precision[named == kind].mean())
    by_layer = precision.mean(1)
    whole = float(by_layer[layers == 1].mean() - by_layer[layers != 1].mean())
    within = [
        float(row[kinds == 1].mean() - row[kinds != 1].mean())
        for row, kinds in zip(precision, named, strict=True)
        if 0 < int((kinds == 1).sum()) < len(kinds)
    ]
    numbers |= {
        "hybrid layers above others": whole,
        "hybrid heads above others of their layer": statistics.fmean(within),
    }
    return min(whole, statistics.fmean(within)), numbers


CLAIM = Claim(
    key="P337",
    method="AttentionNMI",
    says="Attention is local, hybrid or global by its mutual information between queries and keys, and the hybrid "
    "kind, which sees what is near and the foreground, is the one that segments.",
    paper_number="up to 13.5 % mIoU above other ways of pretraining, for the whole framework; none for the measure",
    setup=f"DINOv2-S/14, {SCENES} crops of one photograph a seed, each with a disc of a flower from another; from "
    f"{ASKED} patches of the disc, attention ranks all others, and those of the disc are asked for. Hybrid layers "
    "against all others, and, since kind goes with depth, hybrid heads against all others of their own layer; the "
    "lower of the two. No training and nothing infrared. Where kinds end was set after a look at the mutual "
    "information in one batch of scenes, before anything was ranked.",
    effect="average precision of hybrid attention above the rest, the lower of layers and of heads within them",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
