"""Spark attention against a reading of the paper's formula in loops."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import NormalDist, fmean, pstdev

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.methods import SparkAttention
from tests.methods.rows import agrees, agrees_where_all_is_seen, learns

TELL, GATE = [0, 1, 4, 5], [2, 3, 6, 7]  # of a head's 8 channels
SCALE = 8**-0.5


def chosen(scores: list[float], keep: int) -> list[int]:
    if len(scores) <= keep:
        return list(range(len(scores)))
    threshold = fmean(scores) + pstdev(scores) * NormalDist().inv_cdf(1 - keep / len(scores))
    return [j for j, s in enumerate(scores) if s >= threshold] or [scores.index(max(scores))]


def row(query: Tensor, keys: Tensor, keep: int, scale: float) -> Tensor:
    """What one query gives the keys that it sees."""
    tell, gate = ([query[p] @ k[p] * scale for k in keys] for p in (TELL, GATE))
    out = torch.zeros(len(keys), dtype=query.dtype)
    kept = chosen([float(s.detach()) for s in tell], keep)
    soft = torch.stack([tell[j] for j in kept]).exp()
    return out.index_put(
        (torch.tensor(kept),), soft / soft.sum() * torch.stack([(1 + gate[j].exp()).log() for j in kept])
    )


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("keep", [1, 4, 256])
def test_the_formula_in_every_backend(backend: str, keep: int) -> None:
    agrees(SparkAttention(keep), partial(row, keep=keep, scale=SCALE), backend, (0, 3, 4, 7, 8, 18))


def test_a_call_that_hides_nothing_chooses_among_all_keys() -> None:
    agrees_where_all_is_seen(SparkAttention(5), partial(row, keep=5, scale=SCALE))


def test_both_products_are_bounded_as_the_model_bounds_one() -> None:
    bare = Bare()
    bare.call = replace(bare.call, softcap=0.5)
    heads, _ = bare.run(SparkAttention(), "reference")
    k = bare.k[1, 0]
    tell, gate = (
        torch.stack([0.5 * torch.tanh(bare.q[1, 0, 18, p] @ x[p] * bare.call.scale / 0.5) for x in k])
        for p in (TELL, GATE)
    )
    assert close(heads[1, 0, 18], (tell.softmax(-1) * (1 + gate.exp()).log()) @ bare.v[1, 0])


def test_equal_scores_are_all_kept_and_gradients_stay_finite() -> None:
    bare = Bare()
    bare.k = bare.k[:, :, :1].expand_as(bare.k).clone().requires_grad_()
    heads, _ = bare.run(SparkAttention(4), "reference")
    gate = (bare.q[..., GATE] * bare.k.detach().repeat_interleave(2, 1)[..., :1, GATE]).sum(-1) * bare.call.scale
    mean = bare.v.repeat_interleave(2, 1).cumsum(2) / torch.arange(1, 20)[:, None]
    assert close(heads[:, :, :4], ((1 + gate.exp()).log()[..., None] * mean)[:, :, :4])
    heads.square().sum().backward()
    assert bare.k.grad is not None
    assert bool(bare.k.grad.isfinite().all())


def test_about_as_many_keys_are_looked_at_as_are_asked_for() -> None:
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    call = replace(Bare().call, keep=None)
    for keep in (20, 200, 1000):
        threshold = SparkAttention(keep)._threshold(scores[None, None, None], call)
        assert abs(int((scores >= threshold).sum()) / keep - 1) < 0.2


def test_the_first_step_s_loss_and_gradient() -> None:
    learns(SparkAttention(3), partial(row, keep=3, scale=SCALE))


def test_the_paper_s_256_and_errors() -> None:
    assert SparkAttention() == SparkAttention(256)
    with pytest.raises(FieldError, match=r"SparkAttention.keep = 0: must be 1 or more"):
        SparkAttention(0)
    bare = Bare()
    for call in (replace(bare.call, query=bare.q), replace(bare.call, key=bare.k)):
        with pytest.raises(SiteError, match="layer 0: queries and keys are not known"):
            SparkAttention().weigh(bare.q, call)
