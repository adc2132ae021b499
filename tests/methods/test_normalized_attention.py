"""NAP against a reading of the paper's formula in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.methods import NormalizedAttention
from tests.by_hand import heads_of, llama_states

SIZE = Layer(3, 4, 2, 8, 6, 32)


def row(scores: list[float], gain: float, shift: float, eps: float) -> list[float]:
    mean = sum(scores) / len(scores)
    variance = sum((s - mean) ** 2 for s in scores) / len(scores)
    return [gain * (s - mean) / math.sqrt(variance + eps) + shift for s in scores]


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_the_formula_in_every_backend(backend: str, eps: float) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare, method = Bare(text=text), NormalizedAttention(eps)
    params = {"gain": torch.tensor([1.0, 2.0, -0.5, 0.7]), "shift": torch.tensor([0.0, 0.3, -0.2, 1.0])}
    heads, _ = bare.run(method, backend, params=params, tile_rows=7 if backend == "tiled" else None)
    for b, h, t in ((0, 0, 3), (0, 1, 4), (0, 2, 12), (0, 3, 18), (1, 0, 0), (1, 1, 0), (1, 2, 1), (1, 3, 18)):
        seen = [j for j in range(t + 1) if text[b, j]]
        if not seen:
            assert not bool(heads[b, h, t].any())
            continue
        k, v = bare.k[b, h // 2].double(), bare.v[b, h // 2].double()
        scores = [float(bare.q[b, h, t].double() @ k[j]) * bare.call.scale for j in seen]
        weights = row(scores, float(params["gain"][h]), float(params["shift"][h]), eps)
        assert close(heads[b, h, t], sum(w * v[j] for w, j in zip(weights, seen, strict=True)).float())


def test_a_call_that_hides_nothing_standardises_whole_rows() -> None:
    bare = Bare(rules=())
    heads, _ = bare.run(NormalizedAttention(), "reference")
    scores = bare.q @ bare.k.repeat_interleave(2, 1).mT * bare.call.scale
    weights = torch.tensor([[[row(x, 1.0, 0.0, 1e-5) for x in y] for y in z] for z in scores.tolist()])
    assert close(heads, heads_of(weights, bare.v))


def test_it_starts_as_a_plain_standardisation() -> None:
    found = NormalizedAttention().parameters(SIZE)
    assert found["gain"].tolist() == [1.0] * 4
    assert found["shift"].tolist() == [0.0] * 4


def test_a_head_subtracts_one_value_from_another_which_no_softmax_can() -> None:
    """Two keys: the weights are 1 and -1 whatever the scores, and the output is outside the values' hull."""
    bare = Bare()
    heads, _ = bare.run(NormalizedAttention(1e-12), "reference")
    v = bare.v.repeat_interleave(2, 1)
    assert close(heads[:, :, 1].abs(), (v[:, :, 1] - v[:, :, 0]).abs())


def test_equal_scores_weigh_nothing_and_gradients_stay_finite() -> None:
    bare = Bare()
    q = bare.q.clone()
    q[:, :, 5] = 0.0  # every score of this token is zero
    bare.q = q.requires_grad_()
    heads, _ = bare.run(NormalizedAttention(), "reference")
    assert not bool(heads[:, :, [0, 5]].any())
    heads.square().sum().backward()
    assert bare.q.grad is not None
    assert bool(bare.q.grad.isfinite().all())


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    ids = inputs["input_ids"]
    with attach(model, NormalizedAttention()) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if "heedful" in name}
        assert len(found) == 2 * len(model.model.layers)
    made: dict[str, list[Tensor]] = {"gain": [], "shift": []}

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        q, k = rotate(q), rotate(k)  # type: ignore[operator]
        h, n, d = q.shape[1:]
        gain, shift = torch.ones(h, requires_grad=True), torch.zeros(h, requires_grad=True)
        made["gain"].append(gain)
        made["shift"].append(shift)
        scores = q @ k.repeat_interleave(h // k.shape[1], 1).mT / d**0.5
        rows = []
        for t in range(n):
            s = scores[:, :, t, : t + 1]
            s = (s - s.mean(-1, keepdim=True)) / (s.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            rows.append(torch.nn.functional.pad(gain[:, None] * s + shift[:, None], (0, n - t - 1)))
        return heads_of(torch.stack(rows, 2), v)

    logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for name, tensors in made.items():
        grads = [g for key, g in found.items() if key.endswith(name)]
        for got, tensor in zip(grads, tensors, strict=True):
            assert got is not None
            assert tensor.grad is not None
            assert bool(got.any())
            assert close(got, tensor.grad)


def test_settings_are_checked() -> None:
    with pytest.raises(FieldError, match=r"NormalizedAttention.eps = 0.0: must be above 0"):
        NormalizedAttention(0)
    with pytest.raises(FieldError, match="eps = inf"):
        NormalizedAttention(math.inf)
