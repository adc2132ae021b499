"""PAINT: the last row's scores rise on the informative tokens of a marked span."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.methods.intervene.vision.paint import PAINT
from tests.by_hand import padding_counts_for_nothing

N, SPAN = 16, (3, 14)


def _call(is_text: Tensor | None = None) -> Call:
    keep = torch.ones(N, N, dtype=torch.bool).tril()[None, None]
    keys = Positions.row(0, N)
    queries = Positions.row(0, N, is_filled=None if is_text is None else is_text[:, None])
    call = Call(0, 4, "layer", 4, 2, queries, keys, 1.0, roles={"marked": (SPAN,)}, keep=keep)
    return replace(call, rows=slice(0, N), cols=slice(0, N))


def _scores() -> Tensor:
    scores = torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(0))
    scores[..., 7] += 4  # an outlier
    return scores


def _by_loops(scores: Tensor, last: list[int], m: PAINT) -> Tensor:
    out = scores.clone()
    for b, i in enumerate(last):
        weights = scores[b, :, i, : i + 1].softmax(-1).sum(0)
        span = [j for j in range(*SPAN) if j <= i]
        given = weights[span].double().numpy()
        low, high = np.percentile(given, 25), np.percentile(given, 75)
        summary = [j for j, x in zip(span, given, strict=True) if x > high + 1.5 * (high - low)]
        ranked = sorted(span, key=lambda j: -float(weights[j]))[: int(np.ceil(len(span) * m.share))]
        for j in span:
            gain = m.beta if j in summary else m.alpha if j in ranked else 0.0
            out[b, :, i, j] = scores[b, :, i, j].abs() * gain + scores[b, :, i, j]
    return out


@pytest.mark.parametrize("method", [PAINT(), PAINT(alpha=1.5, beta=0.0, share=0.6), PAINT(alpha=0.0, beta=2.0)])
def test_the_formula(method: PAINT) -> None:
    is_text = torch.ones(2, N, dtype=torch.bool)
    is_text[1, -4:] = False
    call = _call(is_text)
    method.find_last(torch.empty(0), call)
    scores = _scores()
    found = method.raise_informed(scores, call)
    wanted = _by_loops(scores, [N - 1, N - 5], method)
    assert close(found, wanted)
    assert not close(found, scores)


def test_tiles_see_the_last_row_of_the_call() -> None:
    method, call, scores = PAINT(), _call(), _scores()
    method.find_last(torch.empty(0), call)
    whole = method.raise_informed(scores, call)
    for start, stop in ((0, 9), (9, N)):
        part = call.tile(slice(start, stop), slice(0, N))
        found = method.raise_informed(scores[:, :, start:stop], replace(part, keep=call.keep[:, :, start:stop]))
        assert torch.equal(found, whole[:, :, start:stop])


def test_gains_of_known_weights() -> None:
    given = torch.tensor([[0.9, 0.1, 0.11, 0.12, 0.13, 0.17, 0.0]])
    seen = torch.tensor([[False, True, True, True, True, True, False]])
    wanted = torch.tensor([[0, 0, 0, 0.7, 0.7, 0.3, 0]])
    assert torch.equal(PAINT(alpha=0.7, beta=0.3, share=0.5).gains(given, given, seen), wanted)
    assert not PAINT().gains(given, given, torch.zeros_like(seen)).any()
    other = torch.tensor([[0.0, 0.9, 0.5, 0.0, 0.0, 0.8, 0.9]])  # local ones by this, summary ones as before
    wanted = torch.tensor([[0, 0.7, 0.7, 0, 0, 0.3, 0]])
    assert torch.equal(PAINT(alpha=0.7, beta=0.3, share=0.5).gains(other, given, seen), wanted)


def test_each_added_token_is_a_last_row() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=1, length=14)["input_ids"]
    with torch.no_grad(), attach(model, PAINT(share=1.0), roles={"marked": ((2, 9),)}) as run:
        out = run(input_ids=ids[:, :-1], use_cache=True)
        step = run(input_ids=ids[:, -1:], **{CACHE: out[CACHE]}).logits
        with run.paused():
            native = model(input_ids=ids).logits
    assert not close_model(step[:, -1], native[:, -1])
    assert close_model(out.logits[:, :-1], native[:, :-2])  # only the last row was edited


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    padding_counts_for_nothing(PAINT(alpha=2.0, share=0.5), side, roles={"marked": ((2, 9),)})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": -1.0}, r"PAINT\.alpha = -1\.0: must be 0 or more"),
        ({"beta": float("inf")}, r"PAINT\.beta"),
        ({"share": 1.5}, r"PAINT\.share"),
        ({"role": ""}, r"PAINT\.role"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        PAINT(**settings)


def test_a_weight_at_the_fence_is_no_summary() -> None:
    """Where all weights are alike the upper quartile and one and a half spreads above it are one of them."""
    even = torch.full((1, 4), 0.25)
    found = PAINT(alpha=0.7, beta=0.3, share=0.5).gains(even, even, torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(found, torch.tensor([[0.7, 0.7, 0.0, 0.0]]))


def test_it_is_idle_without_gains() -> None:
    for alpha, beta, idle in ((0.0, 0.0, True), (1.0, 1.0, False), (0.0, 0.5, False), (0.5, 0.0, False)):
        assert PAINT(alpha=alpha, beta=beta).idle(_call()) == idle
    assert PAINT().idle(replace(_call(), cross=True))


class _Scores(Method):
    """Scores as they are where it stands in a stack, by layer, of models whose calls are one tile."""

    after: bool

    @reads(Site.SCORES)
    def keep(self, scores: Tensor, call: Call) -> Cat | None:
        return Cat.of(f"{call.forward:03d}", scores) if call.causal else None

    def answer(self, readings: Readings) -> dict[int, list[Tensor]]:
        return {layer: stat.value for layer, stat in readings.items()}  # a tensor a forward


IMAGE = ((1, 17),)


@pytest.fixture(scope="module")
def llava() -> Any:
    sizes = {"image_size": 16, "num_hidden_layers": 3}
    return models.tiny("llava", attn_implementation="eager", vision_config=sizes, image_seq_length=16)


def _informed(maps: list[Tensor], m: PAINT) -> list[float]:
    """Each patch's gain by an encoder's maps `[h n n]` of one image, of its first layer and its last but one."""
    local, summary = ([sum(float(head[0, 1 + j]) for head in maps[i]) for j in range(16)] for i in (0, -2))
    low, high = np.percentile(summary, 25), np.percentile(summary, 75)
    ranked = sorted(range(16), key=lambda j: -local[j])[: int(np.ceil(16 * m.share))]
    out = [j for j in range(16) if summary[j] > high + 1.5 * (high - low)]
    return [m.beta if j in out else m.alpha if j in ranked else 0.0 for j in range(16)]


@torch.no_grad()
@pytest.mark.parametrize("layers", [range(3, 5), [4]])
def test_the_encoders_class_token_tells_what_is_informative(llava: Any, layers: Any) -> None:
    method = PAINT("image", alpha=0.9, beta=0.4, share=0.3, by_class=True)
    inputs = models.tiny_inputs(llava, length=22, batch=2)
    maps = llava.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    gains = torch.tensor([_informed([x[i] for x in maps], method) for i in range(2)])
    assert len(gains.unique()) == 3  # there are local ones, summary ones and others
    before, after = _Scores(False), _Scores(True)
    stack = before | method.on(layers=[0, 1, *layers]) | after
    with attach(llava, stack, roles={"image": IMAGE, "patches": IMAGE}) as run:
        out = run(**inputs, use_cache=True)
        run(input_ids=inputs["input_ids"][:, -1:], **{CACHE: out[CACHE]})  # no encoder before it
        seen, edited = run[before], run[after]
    assert seen.keys() == edited.keys() == {3, 4}
    for layer in seen:
        for plain, found in zip(seen[layer], edited[layer], strict=True):
            wanted = plain.clone()
            if layer in layers:
                wanted[:, :, -1, 1:17] += gains[:, None] * plain[:, :, -1, 1:17].abs()
            assert close(found, wanted)


def test_what_the_encoder_must_tell_is_asked_for(llava: Any) -> None:
    inputs, method = models.tiny_inputs(llava, length=22, batch=1), PAINT("image", by_class=True)
    for layers, roles, match in (
        ([3, 4], {"image": IMAGE, "patches": IMAGE}, r"PAINT\.by_class.*first layer and its last but one"),
        ([0, 3], {"image": IMAGE, "patches": IMAGE}, r"PAINT\.by_class"),
        (range(5), {"image": ((1, 18),), "patches": IMAGE}, r"must hold the 16 patches"),
        (range(5), {"image": IMAGE, "patches": ((0, 16),)}, r"must leave out the encoder's first token"),
    ):
        with pytest.raises(FieldError, match=match), attach(llava, method.on(layers=layers), roles=roles) as run:
            run(**inputs)


def test_a_token_that_some_heads_see_is_raised() -> None:
    keep = torch.ones(N, N, dtype=torch.bool).tril().expand(1, 4, N, N).clone()
    keep[:, 0, :, 5] = False
    method, call, scores = PAINT(alpha=0.5, beta=0.5, share=1.0), replace(_call(), keep=keep), _scores()
    method.find_last(torch.empty(0), call)
    found = method.raise_informed(scores, call)
    assert close(found[:, :, -1, 5], scores[:, :, -1, 5] + 0.5 * scores[:, :, -1, 5].abs())
