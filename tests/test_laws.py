"""Every law rejects a method made to break it, and keeps quiet about one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import check
from heedful.conformance import laws, subjects
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.mask import Mask, Rule
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.positions import Pairs
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Mean, Statistic, Sum
from tests.samples import BREAK_LAWS, CountsTiles, FoldsElsewhere

PAPER = Paper("T000", "A test", "A. Tester", 2026, url="https://example.org")


class Scale(Method):
    """Honest: multiplies what heads hand over."""

    paper = PAPER
    by: float = 1.5

    @classmethod
    def neutral(cls) -> Scale:
        return cls(1.0)

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * self.by


class Received(Method):
    """Honest: reads how much attention each head spends."""

    paper = PAPER

    @reads(Site.PATTERN)
    def add_up(self, pattern: Tensor, call: Call) -> Mean:
        return Mean.of(pattern.sum((0, 2, 3)), pattern.shape[0] * pattern.shape[2])


class MendsHidden(Method):
    """Changes the layer's input behind everybody's back."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def write(self, heads: Tensor, call: Call) -> Tensor:
        call.hidden.mul_(2.0)
        return heads * 2


class InPlace(Method):
    """Edits its input in place."""

    paper = PAPER

    @at(Site.QUERY)
    def write(self, q: Tensor, call: Call) -> Tensor:
        return q.mul_(2.0)


class FourHeads(Method):
    """Knows one shape only."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def reverse(self, heads: Tensor, call: Call) -> Tensor:
        return heads[:, torch.tensor([3, 2, 1, 0])].reshape(heads.shape)


class TileMean(Method):
    """Says it is row-local and looks at other rows."""

    paper = PAPER

    @at(Site.PATTERN)
    def centre(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern * (1 + pattern.mean((-2, -1), keepdim=True))


class UnitHeads(Method):
    """Divides by zero where a query saw nothing."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def normalise(self, heads: Tensor, call: Call) -> Tensor:
        return heads / heads.norm(dim=-1, keepdim=True)


class MeanOfAll(Method):
    """Ignores causality and padding."""

    paper = PAPER

    @at(Site.MIX)
    def average(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, _, v = qkv
        return call.spread(v).mean(2, keepdim=True).expand(-1, -1, q.shape[2], -1)


class LooksAhead(Method):
    """Mixes later values into earlier ones."""

    paper = PAPER

    @at(Site.VALUE)
    def blur(self, v: Tensor, call: Call) -> Tensor:
        return v + v.mean(2, keepdim=True)


class Unwritten(Method):
    """Reads memory that nobody wrote."""

    paper = PAPER

    @at(Site.PATTERN)
    def add_garbage(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern + 0.1 * torch.empty_like(pattern)


class KnowsItsTile(Method):
    """Gives other values, tile by tile, than for the whole map."""

    paper = PAPER

    @at(Site.SCORES)
    def shift(self, scores: Tensor, call: Call) -> Tensor:
        return scores * (1 + 0.01 * call.rows.start)


class NoGradient(Method):
    """Right values, and in tiles no gradient."""

    paper = PAPER

    @at(Site.PATTERN)
    def cut(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern * 0.5 if call.rows.stop == 19 and call.rows.start == 0 else pattern.detach() * 0.5


class Last(Statistic):
    """A 'statistic' that remembers only what came last."""

    total: Tensor

    def __init__(self, total: Tensor) -> None:
        object.__setattr__(self, "total", total)

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def settings(self) -> dict[str, Any]:
        return {}

    def merge(self, other: Last) -> Last:
        return other

    @property
    def value(self) -> Tensor:
        return self.total


class RemembersLast(Method):
    """Its statistic depends on the order of merging."""

    paper = PAPER

    @reads(Site.PATTERN)
    def last(self, pattern: Tensor, call: Call) -> Last:
        return Last(pattern.detach().sum((0, 2, 3)).double())


class BatchMean(Method):
    """Its statistic of a batch is not the sum of its texts'."""

    paper = PAPER

    @reads(Site.PATTERN)
    def square(self, pattern: Tensor, call: Call) -> Sum:
        return Sum.of(pattern.square().mean((0, 2, 3)))


class NotQuiteNeutral(Scale):
    """Neutral settings that are not."""

    paper = PAPER

    @classmethod
    def neutral(cls) -> NotQuiteNeutral:
        return cls(1.0 + 1e-6)


class Idle(Scale):
    """Example settings that change nothing."""

    paper = PAPER

    @classmethod
    def example(cls) -> Idle:
        return cls(1.0)


class LeavesTrace(Method):
    """Writes into the model."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def mark(self, heads: Tensor, call: Call) -> Tensor:
        layer = subjects.tiny_model("llama").get_submodule("model.layers.0")
        layer.visits = getattr(layer, "visits", 0) + 1
        return heads * 1.5


class FirstIndices(Rule):
    """The first two slots of the row, padding or not."""

    def keeps(self, pairs: Pairs) -> Tensor:
        return (pairs.k_index < 2) | (pairs.k_index == pairs.q_index)


class ByIndex(Method):
    """Uses indices where positions are meant."""

    paper = PAPER

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & FirstIndices()


class ByRow(Method):
    """Counts the queries of a call instead of asking for their positions."""

    paper = PAPER

    @at(Site.QUERY)
    def grow(self, q: Tensor, call: Call) -> Tensor:
        return q * torch.linspace(1, 2, q.shape[2])[:, None] if q.shape[2] > 1 else q


class Proud(Method):
    """Fails after others and declares no clash."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def refuse(self, heads: Tensor, call: Call) -> Tensor:
        if bool((heads == 0).any()) or call.mask.rules[1:]:
            raise SiteError("Proud works alone")
        return heads * 2


class Boasts(Scale):
    """Declares what is not so."""

    paper = PAPER

    def declares(self, tokens: int) -> dict[str, float]:
        return {"density": 0.1}


class Undocumented(Scale):
    paper = Paper("T000", "A test", "", 2026)


class DoublesAlways(Surgery):
    """Changes weights under neutral settings too."""

    paper = PAPER

    @classmethod
    def neutral(cls) -> DoublesAlways:
        return cls()

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return HeadWeights(2 * weights.q, weights.k, weights.v, weights.o)


class InventsTokens(Tokens):
    """Puts a token of its own in front."""

    paper = PAPER

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        return Prompt((127, *prompt.tokens))


class ReversesAlways(Tokens):
    """Reverses under neutral settings too."""

    paper = PAPER

    @classmethod
    def neutral(cls) -> ReversesAlways:
        return cls()

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        return Prompt(prompt.tokens[::-1])


class LikesTheWorst(Decode):
    """Decodes the least likely token, under neutral settings too."""

    paper = PAPER

    @classmethod
    def neutral(cls) -> LikesTheWorst:
        return cls()

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        return {"prompt": (prompt, Stack())}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return -logits["prompt"]


class Moody(LikesTheWorst):
    """Never decodes twice the same."""

    paper = PAPER

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return torch.randn_like(logits["prompt"])


MUTANTS = [
    ("hands_off", MendsHidden(), "hidden was changed in place"),
    ("hands_off", InPlace(), "changed its input in place"),
    ("any_shape", FourHeads(), "raised"),
    ("any_tile", TileMean(), "tiles of 1 rows change the output"),
    ("masked_rows", UnitHeads(), "not finite"),
    ("masked_rows", MeanOfAll(), "got something"),
    ("causal", LooksAhead(), "moves earlier ones"),
    ("backends_agree", Unwritten(), "memory that nobody wrote"),
    ("backends_agree", KnowsItsTile(), "tiled: values are off"),
    ("backends_agree", NoGradient(), "tiled: the gradient of queries"),
    ("told_alike", CountsTiles(), "tiled: count"),
    ("statistics", RemembersLast(), "another order of merging"),
    ("statistics", BatchMean(), "a batch is not the sum of its texts"),
    ("neutral_is_native", NotQuiteNeutral(2.0), "moves logits"),
    ("example_acts", Idle.example(), "changes nothing"),
    ("declared_sites_only", MendsHidden(), "HIDDEN changed"),
    ("leaves_no_trace", LeavesTrace(), "something stays in the model"),
    ("padding", ByIndex(), "left padding moves logits"),
    ("streaming", ByRow(), "logits differ"),
    *BREAK_LAWS,
    ("composes", Proud(), "declares no clash"),
    ("declared_numbers", Boasts(), "declares density"),
    ("is_documented", Undocumented(), "lacks title, authors"),
    ("folds_are_equal", FoldsElsewhere(), "in weights, logits differ"),
    ("surgery_is_clean", DoublesAlways(), "changes the model"),
    ("prompt_steps", InventsTokens(), "tokens that the old one has not and `adds` does not tell: [127]"),
    ("prompt_steps", ReversesAlways(), "changes the prompt"),
    ("decoding_steps", LikesTheWorst(), "decodes otherwise"),
    ("decoding_steps", Moody(), "other tokens"),
]


@pytest.mark.parametrize(("name", "mutant", "reason"), MUTANTS, ids=[f"{n}-{type(m).__name__}" for n, m, _ in MUTANTS])
def test_each_law_rejects_its_mutant(name: str, mutant: Any, reason: str) -> None:
    verdict = check(mutant, only=(name,))[name]
    assert verdict.outcome == "broken"
    assert reason in verdict.reason


def test_every_law_has_a_mutant() -> None:
    assert {name for name, _, _ in MUTANTS} == set(laws())


@pytest.mark.parametrize("honest", [Scale(), Received()], ids=["edit", "reader"])
def test_honest_methods_keep_every_law(honest: Method) -> None:
    report = check(honest)
    assert report.ok, str(report)
    assert "0 broken" in str(report)


def test_check_wants_a_method() -> None:
    with pytest.raises(FieldError, match=r"check\(\).method = 3: must be a method \(without .*\) or type"):
        check(3)  # type: ignore[arg-type]
