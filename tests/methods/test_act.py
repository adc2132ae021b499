"""ACT: sinks inside the text lose weight, and each row's other keys get it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.methods.intervene.language import act
from heedful.methods.intervene.language.act import ACT
from tests.by_hand import padding_counts_for_nothing


def _pattern(n: int = 13, seed: int = 0) -> Tensor:
    scores = 3 * torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(seed))
    scores[..., 5] += 4
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


def _call(n: int, start: int = 0) -> Call:
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    positions = Positions.row(start, n)
    return Call(
        0, 2, "layer", 3, 3, positions, positions, 1.0, keep=keep[None, None], rows=slice(0, n), cols=slice(0, n)
    )


def _summary(pattern: Tensor, call: Call) -> Summary:
    accumulator = SummaryAccumulator(frozenset({"received"}), call)
    accumulator.add(pattern, None, call)
    return accumulator.summary()


def _calibrated(method: ACT, pattern: Tensor, call: Call) -> Tensor:
    shift = method.calibrate(_summary(pattern, call), call)
    return pattern if shift is None else shift.of(pattern, slice(None))


def _by_loops(pattern: Tensor, beta: float, high: float) -> Tensor:
    """The formula, column by column and row by row, as the authors' code reads."""
    out = pattern.clone()
    n = pattern.shape[-1]
    for b in range(pattern.shape[0]):
        for h in range(pattern.shape[1]):
            a = pattern[b, h]
            sinks = [k for k in range(n) if float(a[:, k].sum()) / (n - k) > high][1:]
            rest = [k for k in range(n) if k not in sinks]
            for i in range(n):
                freed = (1 - beta) * sum(float(a[i, k]) for k in sinks)
                for k in sinks:
                    out[b, h, i, k] = beta * a[i, k]
                for k in rest:
                    out[b, h, i, k] = a[i, k] + freed * a[i, k] / a[i, rest].sum()
    return out


@pytest.mark.parametrize(("beta", "high"), [(0.4, 0.1), (0.0, 0.2), (0.9, 0.05)])
def test_the_formula(beta: float, high: float) -> None:
    pattern = _pattern()
    found = _calibrated(ACT(beta, high), pattern, _call(13))
    assert close(found, _by_loops(pattern, beta, high))
    assert close(found.sum(-1), torch.ones(2, 3, 13))
    assert not close(found, pattern)


def test_the_papers_threshold_shrinks_with_length() -> None:
    pattern = _pattern()
    assert torch.equal(
        _calibrated(ACT(ratio=1.3), pattern, _call(13)), _calibrated(ACT(threshold=0.1), pattern, _call(13))
    )


def test_the_first_sink_is_spared_and_decoding_left_alone() -> None:
    pattern, call = _pattern(), _call(13)
    sinks = ACT(threshold=0.05).sinks(_summary(pattern, call), call)
    high = pattern.sum(-2) / torch.arange(13, 0, -1) > 0.05
    assert torch.equal(high.sum(-1) - 1, sinks.sum(-1))
    assert not sinks.gather(-1, high.long().argmax(-1, keepdim=True)).any()
    assert ACT().idle(replace(call, phase=Phase.DECODE))
    assert not ACT().idle(call)


def test_a_row_with_nobody_to_give_to_stays() -> None:
    pattern = torch.zeros(1, 3, 4, 4)
    pattern[..., 0, 0] = pattern[..., 1, 1] = pattern[..., 2, 1] = pattern[..., 3, 1] = 1
    found = _calibrated(ACT(), pattern, _call(4))
    assert torch.equal(found, pattern)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    padding_counts_for_nothing(ACT(threshold=0.05), side)


def test_heads_are_chosen_by_wrapping() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model, length=20)
    with torch.no_grad():
        native = model(**inputs).logits
        logits = []
        for part in (ACT.example(), ACT.example().on(layers=1, heads=[0, 3])):
            with attach(model, part) as run:
                logits.append(run(**inputs).logits)
    assert not torch.equal(logits[0], native)
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], native)


def test_only_heads_that_a_fit_chose_are_calibrated() -> None:
    pattern, call = _pattern(), _call(13)
    every = _calibrated(ACT(threshold=0.05), pattern, call)
    found = _calibrated(ACT(threshold=0.05, heads=((0, 1), (1, 2))), pattern, call)
    assert torch.equal(found[:, 1], every[:, 1])
    assert torch.equal(found[:, [0, 2]], pattern[:, [0, 2]])
    assert not torch.equal(every[:, [0, 2]], pattern[:, [0, 2]])
    by_head = replace(call, keep=call.keep.expand(-1, 3, -1, -1))
    assert torch.equal(_calibrated(ACT(threshold=0.05, heads=((0, 1),)), pattern, by_head), found)
    for heads in (((0, 3),), ((0, 1), (call.depth, 0))):
        with pytest.raises(FieldError, match="fitted to another model"):
            _calibrated(ACT(heads=heads), pattern, call)
    with pytest.raises(FieldError, match="a pair of layer and head"):
        ACT(heads=((0, -1),))


def test_a_fit_keeps_the_heads_that_gain() -> None:
    model = models.tiny("llama", num_hidden_layers=5)
    inputs = models.tiny_inputs(model, batch=3, length=18)
    options = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    start = ACT(beta=0.0, threshold=0.07)

    def gain(part: Method) -> float:
        with torch.no_grad():
            plain = model(**inputs).logits[:, -1]
            with attach(model, part) as run:
                edited = run(**inputs).logits[:, -1]
        return float(
            (edited.gather(-1, options).log_softmax(-1) - plain.gather(-1, options).log_softmax(-1))[:, 0].mean()
        )

    positions = [(n, h) for n in (2, 3) for h in range(model.config.num_attention_heads)]
    wanted = tuple(place for place in positions if gain(start.on(*place)) > 0)
    assert 0 < len(wanted) < len(positions)
    batches = [{k: v[i : i + 1] for k, v in {**inputs, "options": options}.items()} for i in range(3)]
    found = fit(replace(start, tries=None), model, batches)
    assert found.heads == wanted
    assert set(fit(replace(start, tries=2), model, batches).heads) <= set(wanted)
    assert isinstance(hash(found), int)


def test_a_fit_takes_plain_text_and_targets_too() -> None:
    model = models.tiny("llama", num_hidden_layers=5)
    inputs = models.tiny_inputs(model, batch=2, length=18)
    padded = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    padded["attention_mask"][0, :4] = 0
    start = ACT(beta=0.0, threshold=0.07)
    plain = fit(start, model, [padded])
    assert plain.heads is not None
    assert fit(start, model, [{**padded, "target": torch.tensor([3, 4])}]).heads != plain.heads
    with pytest.raises(FieldError, match=r"ACT\.batches"):
        fit(start, model, [])


def test_neutral_is_the_model_itself_bit_for_bit() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        native = model(**inputs).logits
        with pytest.warns(match="changed nothing"), attach(model, ACT.neutral(), backend="reference") as run:
            assert torch.equal(run(**inputs).logits, native)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"beta": 1.5}, r"ACT\.beta = 1\.5: must lie from 0 to 1"),
        ({"threshold": -0.1}, r"ACT\.threshold"),
        ({"ratio": 0.0}, r"ACT\.ratio"),
        ({"tries": 0}, r"ACT\.tries"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        ACT(**settings)


def test_a_fit_tries_the_heads_with_the_most_to_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama", num_hidden_layers=5, attn_implementation="eager")
    inputs = models.tiny_inputs(model, batch=2, length=18)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    rows = torch.arange(18, 0, -1)
    high = {(n, h): (maps[n][:, h].sum(-2) / rows > 0.06).sum(-1) for n in (2, 3) for h in range(4)}
    counted = {place: int((x - 1).clamp(min=0).sum()) for place, x in high.items()}
    ranked = sorted(counted, key=lambda place: -counted[place])
    assert counted[ranked[2]] > counted[ranked[3]]
    tried: list[object] = []
    monkeypatch.setattr(act, "gains", lambda context, method, positions, batches: tried.extend(positions) or {})
    fit(ACT(threshold=0.06, tries=3), model, [inputs])
    assert set(tried) == set(ranked[:3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_papers_threshold_counts_each_texts_own_tokens(side: str) -> None:
    model, method = models.tiny("llama"), ACT(ratio=0.9)
    ids = models.tiny_inputs(model, batch=2, length=14)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if side == "left" else slice(8, 14)] = 0
    own = mask[1].bool()
    with torch.no_grad(), attach(model, method) as run:
        found = run(input_ids=ids, attention_mask=mask).logits
        assert close_model(found[:1], run(input_ids=ids[:1]).logits)
        assert close_model(found[1:, own], run(input_ids=ids[1:, own]).logits)
        assert run.activity().active
