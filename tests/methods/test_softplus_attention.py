"""LSSAR against a reading of the paper's two stages in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods import SoftplusAttention
from tests.by_hand import heads_of, llama_states


def weights(query: Tensor, keys: Tensor, power: float) -> Tensor:
    """What one query gives the keys that it sees, the sums left as the paper has them."""
    n, d = keys.shape
    cosines = [query @ k / (query.norm() * k.norm()) for k in keys]
    first = torch.stack([torch.log(1 + torch.exp(math.log(d) * math.log(n) * c)) for c in cosines])
    first = first / first.sum()
    second = torch.relu(n * first - (0 if n <= 3 else 1)) ** power
    return second / second.sum()


def rows(q: Tensor, k: Tensor, power: float) -> Tensor:
    """All rows of a causal map, `[b h n n]`."""
    b, h, n, _ = q.shape
    k = k.repeat_interleave(h // k.shape[1], 1)
    pad = torch.nn.functional.pad
    made = [
        pad(weights(q[i, j, t], k[i, j, : t + 1], power), (0, n - t - 1))
        for i in range(b)
        for j in range(h)
        for t in range(n)
    ]
    return torch.stack(made).view(b, h, n, n)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("power", [1.0, 3.0, 15.0])
def test_the_formula_in_every_backend(backend: str, power: float) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare = Bare(text=text)
    heads, _ = bare.run(SoftplusAttention(power), backend, tile_rows=7 if backend == "tiled" else None)
    for b, h, t in (
        (0, 0, 3),
        (0, 1, 4),
        (0, 2, 6),
        (0, 3, 7),
        (0, 0, 18),
        (1, 0, 0),
        (1, 1, 2),
        (1, 2, 3),
        (1, 3, 18),
    ):
        seen = [j for j in range(t + 1) if text[b, j]]
        if not seen:
            assert not bool(heads[b, h, t].any())
            continue
        k, v = bare.k[b, h // 2, seen].double(), bare.v[b, h // 2, seen].double()
        assert close(heads[b, h, t], (weights(bare.q[b, h, t].double(), k, power) @ v).float())


def test_a_call_that_hides_nothing_counts_all_keys() -> None:
    bare = Bare(rules=())
    heads, _ = bare.run(SoftplusAttention(), "reference")
    k = bare.k.repeat_interleave(2, 1)
    made = [[[weights(q, k[b, h], 15.0) for q in bare.q[b, h]] for h in range(4)] for b in range(2)]
    wanted = torch.stack([torch.stack([torch.stack(x) for x in y]) for y in made])
    assert close(heads, heads_of(wanted, bare.v))


def test_the_paper_s_power_is_15() -> None:
    assert SoftplusAttention() == SoftplusAttention(15.0)


def test_equal_keys_leave_nothing_after_the_third_row_and_gradients_stay_finite() -> None:
    bare = Bare()
    k = bare.k[:, :, :1].expand_as(bare.k).clone()
    bare.k = k.requires_grad_()
    heads, _ = bare.run(SoftplusAttention(), "reference")
    v = bare.v.repeat_interleave(2, 1)
    assert close(heads[:, :, 2], v[:, :, :3].mean(2))
    assert not bool(heads[:, :, 3].any())
    heads.square().sum().backward()
    assert bare.k.grad is not None
    assert bool(bare.k.grad.isfinite().all())


def test_the_length_of_queries_and_keys_tells_nothing() -> None:
    bare, longer = Bare(), Bare()
    longer.q, longer.k = 7 * longer.q, 0.2 * longer.k
    method = SoftplusAttention()
    assert close(bare.run(method, "reference")[0], longer.run(method, "reference")[0])


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    names = ("q_proj", "k_proj", "v_proj")

    def gradients(loss: Tensor) -> list[Tensor]:
        parts = [getattr(layer.self_attn, name).weight for layer in model.model.layers for name in names]
        return list(torch.autograd.grad(loss, parts))

    with attach(model, SoftplusAttention(3.0)) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        got = gradients(loss)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        return heads_of(rows(rotate(q), rotate(k), 3.0), v)  # type: ignore[operator]

    logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    for mine, theirs in zip(got, gradients(wanted), strict=True):
        assert bool(mine.any())
        assert close(mine, theirs)


def test_settings_are_checked() -> None:
    with pytest.raises(FieldError, match=r"SoftplusAttention.power = 0.5: must be 1 or more"):
        SoftplusAttention(0.5)
    with pytest.raises(FieldError, match="power = inf"):
        SoftplusAttention(math.inf)
