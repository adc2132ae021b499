"""Laws are tried on what a method is for, beside partners drawn from the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from heedful import check
from heedful.catalogue import entries
from heedful.conformance import model_laws
from heedful.conformance.model_laws import meeting, partners
from heedful.conformance.subjects import SUBJECTS, once, subjects_of, tiny_model
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, reads
from heedful.methods.mechanisms.linear.mala import MALA
from heedful.methods.mechanisms.local.dynamic_conv import DynamicConv
from heedful.methods.mechanisms.score.threshold_relative_attention import ThresholdRelativeAttention

PAPER = Paper("T000", "A test", "A. Tester", 2026, url="https://example.org")


class NearBlind(Method):
    """Honest, for images: a patch does not see the patches in its own row."""

    paper = PAPER
    subjects = ("image",)
    every_token = True
    by: float = 1.0

    @classmethod
    def neutral(cls) -> NearBlind:
        return cls(0.0)

    @at(Site.SCORES)
    def hide(self, scores: Tensor, call: Call) -> Tensor:
        queries, keys = call.coordinates("patches")
        same = (queries[..., :, None, 0] == keys[..., None, :, 0]) & (keys[..., None, :, 0] >= 0)
        return scores - self.by * same


class Everywhere(Method):
    """Honest, for all: sharpens every head."""

    paper = PAPER
    subjects = ("text", "image", "encoder-decoder", "cross", "torch")
    by: float = 2.0

    @classmethod
    def neutral(cls) -> Everywhere:
        return cls(1.0)

    @at(Site.SCORES)
    def scale(self, scores: Tensor, call: Call) -> Tensor:
        return scores * self.by


class OnlyWhereItIsCausal(Everywhere):
    """Claims to be for images and cross-attention, and does nothing there."""

    @at(Site.SCORES)
    def scale(self, scores: Tensor, call: Call) -> Tensor:
        return scores * self.by if call.mask.causal else scores


class TheFirstTextTells(Everywhere):
    """Lets the first text of a batch say how far those beside it are sharpened."""

    subjects = ("cross",)

    @at(Site.SCORES)
    def scale(self, scores: Tensor, call: Call) -> Tensor:
        return scores * (self.by + scores[:1].mean())


class KeepsInTheLayer(Everywhere):
    """Lets a token in a layer go by the last one that the layer read, of whichever text."""

    subjects = ("encoder-decoder",)

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        before = call.state.run.get("last", torch.zeros_like(heads[:1, :, -1:]))
        if call.cross:
            call.state.run["last"] = heads[:1, :, -1:]
        return heads + self.by * before


class GoesByTheCall(Everywhere):
    """Sharpens by how many tokens are read at once."""

    subjects = ("cross",)

    @at(Site.SCORES)
    def scale(self, scores: Tensor, call: Call) -> Tensor:
        return scores * (self.by + len(call.queries) / 10)


class MovesInCross(Everywhere):
    """Its neutral settings are none in cross-attention."""

    @at(Site.SCORES)
    def scale(self, scores: Tensor, call: Call) -> Tensor:
        return scores * (3.0 if call.cross else self.by)


class StaysInImages(Everywhere):
    """Leaves something in models without a cache."""

    subjects = ("image",)

    @at(Site.SCORES)
    def scale(self, scores: Tensor, call: Call) -> Tensor:
        tiny_model("vit").get_submodule("vit").left = True  # type: ignore[assignment]
        return scores * self.by


@pytest.mark.parametrize("kind", [NearBlind, Everywhere])
def test_honest_methods_keep_the_laws_on_all_that_they_are_for(kind: type[Method]) -> None:
    of_texts = ("padding", "each_text_alone")
    of_all = ("neutral_is_native", "example_acts", "leaves_no_trace", "composes", "any_tile")
    report = check(kind, only=(*of_all, *of_texts))
    assert report.ok, str(report)
    for law in of_texts:
        assert (report[law].outcome == "does not apply") == (kind is NearBlind)


@pytest.mark.parametrize(
    ("kind", "law", "reason"),
    [
        (OnlyWhereItIsCausal, "example_acts", "vit: .* changes nothing beyond rounding"),
        (MovesInCross, "neutral_is_native", "bart: .* moves logits"),
        (TheFirstTextTells, "each_text_alone", "in a batch, logits differ"),
        (GoesByTheCall, "streaming", "an answer token by token: logits differ"),
        (KeepsInTheLayer, "each_text_alone", "in a batch, after a token, logits differ"),
        (StaysInImages, "leaves_no_trace", "vit: something stays in the model after a run"),
    ],
)
def test_a_law_is_broken_where_the_subject_shows_it(kind: type[Method], law: str, reason: str) -> None:
    try:
        verdict = check(kind, only=(law,))[law]
    finally:
        vars(tiny_model("vit").get_submodule("vit")).pop("left", None)
    assert verdict.outcome == "broken"
    assert re.match(reason, verdict.reason)


class ByItsGradient(Method):
    """Honest: in training it adds to scores what the gradient was that went back last."""

    paper = PAPER
    by: float = 100.0

    def idle(self, call: Call) -> bool:
        return not call.training

    @at(Site.SCORES)
    def add(self, scores: Tensor, call: Call) -> Tensor:
        last = call.state.run.get("added")
        call.state.run["added"] = added = torch.zeros_like(scores).requires_grad_()
        again = 0.0 if last is None or last.grad is None else self.by * last.grad
        return scores + added + again


class ByNothing(ByItsGradient):
    """Waits for a gradient, and does nothing with it."""

    by: float = 0.0


def test_a_method_may_wait_for_a_gradient_but_then_must_act() -> None:
    assert check(ByItsGradient(), only=("example_acts",))["example_acts"].outcome == "kept"
    verdict = check(ByNothing(), only=("example_acts",))["example_acts"]
    assert verdict.outcome == "broken"
    assert "changes nothing beyond rounding" in verdict.reason


class BeginsAsNothing(Method):
    """Its example adds what it has learned, which at first is nothing."""

    paper = PAPER

    def parameters(self, layer: Layer) -> dict[str, torch.Tensor]:
        return {"added": torch.zeros(layer.heads, 1, 1)}

    @at(Site.HEAD_OUTPUT)
    def add(self, heads: Tensor, call: Call) -> Tensor:
        return heads + call.params["added"]


def test_what_begins_as_nothing_is_told_what_its_example_should_do() -> None:
    assert (
        "let `example` begin with parameters that act"
        in check(BeginsAsNothing, only=("example_acts",))["example_acts"].reason
    )
    assert "parameters" not in check(ByNothing(), only=("example_acts",))["example_acts"].reason


class MeanSoFar(Method):
    """Honest: gives each token the mean of the block's inputs so far."""

    paper = PAPER

    @at(Site.BLOCK)
    def mean(self, x: Tensor, call: Call) -> Tensor:
        is_text = call.is_text[:, 0, :, None]
        return (x * is_text).cumsum(1) / is_text.cumsum(1).clamp(min=1)


class WritesItsInput(MeanSoFar):
    """Doubles what the block is handed, for everybody else too."""

    @at(Site.BLOCK)
    def mean(self, x: Tensor, call: Call) -> Tensor:
        return x.mul_(2.0)


def test_what_replaces_the_block_is_looked_at_where_the_block_begins() -> None:
    assert check(MeanSoFar, only=("declared_sites_only", "padding"))["declared_sites_only"].outcome == "kept"
    verdict = check(WritesItsInput, only=("declared_sites_only",))["declared_sites_only"]
    assert verdict.outcome == "broken"
    assert "at BLOCK, layer 0: changed its input in place" in verdict.reason


class LooksByEditing(MeanSoFar):
    """Gives back what it was handed at the queries: it only looks there."""

    @at(Site.QUERY)
    def look(self, query: Tensor, call: Call) -> Tensor:
        call.state.forward[call.name] = query
        return query

    @at(Site.HEAD_OUTPUT)
    def mean(self, heads: Tensor, call: Call) -> Tensor:
        return heads + call.state.forward[call.name]


def test_an_edit_that_only_looks_is_told_how_to_say_so() -> None:
    verdict = check(LooksByEditing, only=("example_acts",))["example_acts"]
    assert verdict.outcome == "broken"
    assert "at QUERY changed nothing (what only looks is marked @reads)" in verdict.reason


def test_what_asks_for_keys_that_are_not_rotated_may_have_them() -> None:
    only = ("declared_sites_only",)
    assert check(ThresholdRelativeAttention, only=only)["declared_sites_only"].outcome == "kept"


def test_a_claim_is_missed_however_deep_the_method_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paper, "claim", "nowhere")
    for kind in (DynamicConv, MALA):
        verdict = check(kind, only=("is_documented",))["is_documented"]
        assert verdict.outcome == "broken"
        assert "claims/nowhere.py is missing" in verdict.reason


def test_a_claim_that_was_begun_and_not_measured_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `heedful new method` leaves it."""
    (tmp_path / "results").mkdir()
    (tmp_path / f"{DynamicConv.paper.key}.py").touch()
    monkeypatch.setattr(model_laws, "LEDGER", tmp_path)
    verdict = check(DynamicConv, only=("is_documented",))["is_documented"]
    assert verdict.outcome == "broken"
    key = DynamicConv.paper.key
    assert f"claims/results/{key}.json is missing; python -m claims.{key} writes it" in verdict.reason
    (tmp_path / "results" / f"{key}.json").touch()
    assert check(DynamicConv, only=("is_documented",))["is_documented"].outcome == "kept"


def test_subjects_are_known_and_differ() -> None:
    class Odd(Everywhere):
        subjects = ("video",)

    with pytest.raises(FieldError, match="must be some of text, image, encoder-decoder, cross"):
        subjects_of(Odd())
    assert set(SUBJECTS) == set(Everywhere.subjects)
    whole, part = SUBJECTS["encoder-decoder"], SUBJECTS["cross"]
    model = tiny_model("bart")
    found = [s.logits(model, Everywhere()) for s in (whole, part)]
    assert not torch.equal(*found)
    with part.attach(model, Everywhere()) as run:
        assert all("encoder_attn" in name for name in run.layer_names)


def test_what_is_kept_of_a_model_is_read_once_and_nobody_changes_it() -> None:
    model, other, asked = tiny_model("llama"), tiny_model("mha"), []

    def read(model: nn.Module) -> Tensor:
        asked.append(model)
        return torch.ones(3, requires_grad=True) * 2

    once(model, read).zero_()
    assert once(model, read).tolist() == once(other, read).tolist() == [2.0, 2.0, 2.0]
    assert asked == [model, other]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert not once(model, read).requires_grad
    finally:
        torch.set_num_threads(before)
    assert asked == [model, other, model]


def test_what_a_method_left_in_a_model_is_seen_by_the_laws_of_the_next() -> None:
    only, model = ("neutral_is_native", "leaves_no_trace"), tiny_model("llama")
    assert check(Everywhere, only=only).ok
    weight = model.get_parameter("lm_head.weight")
    good = weight.detach().clone()
    try:
        weight.data[5] *= 1.5
        assert [v.outcome for v in check(Everywhere, only=only)] == ["broken", "broken"]
    finally:
        weight.data.copy_(good)
    assert check(Everywhere, only=only).ok


def test_partners_are_one_of_each_way_to_act() -> None:
    class Reads(Method):
        paper = PAPER

        @reads(Site.HEAD_OUTPUT)
        def look(self, x: Tensor, call: Call) -> None: ...

    drawn, all_of_them = partners(Reads()), partners(Reads(), every=True)
    assert frozenset().union(*map(meeting, drawn)) == frozenset().union(*map(meeting, all_of_them))
    for n, other in enumerate(drawn):  # none is there for nothing
        assert meeting(other) - frozenset().union(*map(meeting, drawn[:n]))
    methods = [kind for kind in entries().values() if issubclass(kind, Method)]
    assert len(all_of_them) == sum("text" in kind.subjects for kind in methods)
    assert [repr(m) for m in partners(Reads())] == [repr(m) for m in drawn], "drawn the same every time"


def test_a_prompt_grows_by_what_was_declared_and_no_more() -> None:
    class Grows(Tokens):
        paper = PAPER
        more: int = 2

        def adds(self, prompt: Prompt) -> tuple[int, ...]:
            return (127, 127)

        def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
            return Prompt((127,) * self.more + prompt.tokens)

    assert check(Grows(), only=("prompt_steps",)).ok
    verdict = check(Grows(3), only=("prompt_steps",))["prompt_steps"]
    assert verdict.outcome == "broken"
    assert "`adds` does not tell: [127]" in verdict.reason
