"""Whether two abilities hang on heads of their own: those of one are silenced and both are asked, and the other way."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heedful.adapters.wrapped import device_of
from heedful.api import still
from heedful.core.asked import asks, require_fields
from heedful.core.errors import Code, FieldError, InactiveWarning
from heedful.core.figures import Grid, Head, head_name
from heedful.core.paper import Paper
from heedful.explaining.ablation import ablate
from heedful.explaining.activation_patching import patching
from heedful.explaining.aim import require_count
from heedful.explaining.drawn import Told

PAPER = Paper(
    "P282",
    "Disentangling Recall and Reasoning in Transformer Models through Layer-wise Attention and Activation Analysis",
    "Harshwardhan Fartale, Ashish Kattamuri, Rahul Raja, Arpita Vats, Ishita Prasad, Akshata Kishore Moharir",
    2025,
    "2510.03366",
    differs=(
        "The full text was not at hand: this follows its abstract and the authors' notebooks, where the five heads "
        "whose patched patterns bring most of the answer back are silenced at once. Heads alone; layers and neurons "
        "are not here.",
        "A head is of an ability by the share of its lead that the head carries, less that of the other ability's, on "
        "half of the prompts, to first order; what is lost is measured on the other half.",
        "What is lost is a share of the lead of the right answer over the wrong one; the authors count right answers.",
    ),
)
MOST = 100  # draws, each of which takes two forwards


@dataclass(frozen=True, eq=False)
class Ability:
    """Prompts that a model can answer, each beside one of the same length that asks for the wrong answer instead."""

    name: str
    clean: Tensor  # [b n] token ids
    corrupt: Tensor  # [b n]
    right: Tensor  # [b] the token that answers the clean prompt
    wrong: Tensor  # [b] the one that answers the corrupt one

    def __post_init__(self) -> None:
        require_fields(self)
        for field in ("clean", "corrupt", "right", "wrong"):
            if (given := getattr(self, field)).is_floating_point():
                raise FieldError("Ability", field, given.dtype, "must be token ids, whole numbers", "x.long()")
        rows = self.clean.shape[0] if self.clean.ndim == 2 else 0
        if not rows or not self.clean.shape[1] or self.corrupt.shape != self.clean.shape:
            got = tuple(self.clean.shape), tuple(self.corrupt.shape)
            rule = "and `corrupt` must be prompts of one length, [b n] both"
            raise FieldError("Ability", "clean", got, rule, Code("torch.tensor([[1, 2, 3], [4, 5, 6]])"))
        for field, given in (("right", self.right), ("wrong", self.wrong)):
            if given.shape != (rows,):
                raise FieldError(
                    "Ability", field, tuple(given.shape), f"must be a token for each of {rows} prompts", rows
                )

    def lead(self, logits: Tensor) -> Tensor:
        """How far the right answer stands above the wrong one behind each prompt, `[b]`."""
        last = logits[:, -1].float()
        right, wrong = (last.gather(-1, x.to(last.device)[:, None])[:, 0] for x in (self.right, self.wrong))
        return right - wrong

    def part(self, rows: slice) -> Ability:
        """The same of some prompts."""
        parts = (x[rows] for x in (self.clean, self.corrupt, self.right, self.wrong))
        return Ability(self.name, *parts)


@dataclass(frozen=True, eq=False, repr=False)
class Dissociation(Told):
    """What two abilities lose without heads: rows are whose heads are silenced, columns who is asked."""

    names: tuple[str, str]
    heads: tuple[tuple[Head, ...], tuple[Head, ...]]  # of each ability, the most telling first
    lost: Tensor  # [3 2]: shares of the lead, without the heads of each ability and without as many at random
    lead: Tensor  # [2], with all heads

    @property
    def double(self) -> float:
        """How much more each ability loses by its own heads than by the other's, the smaller of the two."""
        lost = self.lost[:2]
        return float((lost.diagonal() - lost.flip(0).diagonal()).min())

    @property
    def figure(self) -> Grid:
        rows = [f"heads of {self.names[0]}", f"heads of {self.names[1]}", "others, at random"]
        what = "The share of its lead that each ability loses when heads are silenced; below 0 it gains."
        return Grid("dissociation", "Heads silenced", what, self.lost, rows, self.names, "silenced", "asked", "share")

    def __repr__(self) -> str:
        rows = [
            f"lead of the right answer: {', '.join(f'{n} {x:.2f}' for n, x in zip(self.names, self.lead, strict=True))}"
        ]
        for row, silenced in zip(self.lost.tolist(), self.figure.rows, strict=True):
            told = ", ".join(f"{name} loses {x:+.0%}" for name, x in zip(self.names, row, strict=True))
            rows.append(f"  without {silenced}: {told}")
        first = [", ".join(head_name(*head) for head in heads[:10]) for heads in self.heads]
        rows += [f"  heads of {name}: {heads}" for name, heads in zip(self.names, first, strict=True)]
        return "\n".join(rows)


@asks
def dissociate(model: nn.Module, one: Ability, other: Ability, *, count: int = 10, draws: int = 4) -> Dissociation:
    """Find `count` heads of each of two abilities on half of their prompts, and silence them on the other half.

    A double dissociation is two abilities each of which loses by its own heads and not by the other's. One that only
    loses more in both may be the harder one. `draws` times as many other heads are silenced for comparison.
    """
    require_count("dissociate()", count)
    if not 1 <= draws <= MOST:
        raise FieldError("dissociate()", "draws", draws, f"must be from 1 to {MOST}", 4)
    shares, asked, lead = [], [], []
    for field, ability in (("one", one), ("other", other)):
        half = len(ability.clean) // 2
        if not half:
            raise FieldError("dissociate()", field, len(ability.clean), "must have 2 prompts or more", 64)
        shown, rest = ability.part(slice(half)), ability.part(slice(half, None))
        shares.append(patching(model, shown.clean, shown.corrupt, shown.lead, estimate=True).share)
        asked.append(rest)
        lead.append(_lead(model, rest, ()))
        if lead[-1] <= 0:
            rule = (
                "is its lead, and must be above 0: right answers must stand above wrong ones for something to be lost"
            )
            raise FieldError("dissociate()", field, round(float(lead[-1]), 3), rule, "prompts that it can answer")
    apart = shares[0] - shares[1]
    every = [(layer, head) for layer, head in (~apart.isnan()).nonzero().tolist()]
    if 3 * count > len(every):
        rule = f"must be {len(every) // 3} or fewer: heads of two abilities, and as many others"
        raise FieldError("dissociate()", "count", count, rule, len(every) // 3)
    ranked = sorted(every, key=lambda head: -float(apart[head]))
    heads = tuple(ranked[:count]), tuple(ranked[: -count - 1 : -1])
    draw, others = random.Random(0), ranked[count:-count]
    drawn = [draw.sample(others, count) for _ in range(draws)]

    def without(silent: Sequence[Head]) -> Tensor:
        return torch.stack([_lead(model, ability, silent) for ability in asked])

    left = [*map(without, heads), torch.stack([*map(without, drawn)]).mean(0)]
    whole = torch.stack(lead)
    return Dissociation((one.name, other.name), heads, 1 - torch.stack(left) / whole, whole)


@torch.no_grad()
def _lead(model: nn.Module, ability: Ability, silent: Sequence[Head]) -> Tensor:
    """The mean lead of an ability without some heads."""
    ids = ability.clean.to(device_of(model))
    with still(model):
        if not silent:
            return ability.lead(model(input_ids=ids).logits).mean().cpu()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InactiveWarning)  # a head may hand over nothing
            with ablate(model, silent) as run:
                return ability.lead(run(input_ids=ids).logits).mean().cpu()
