"""KolmogorovArnoldAttention against sums of waves, score by score."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Layer, Mask
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.methods import KolmogorovArnoldAttention
from tests.images_by_hand import learns_of_an_image

TOKENS, HEADS = 5, 2


def _set_up(method: KolmogorovArnoldAttention) -> tuple[Call, Tensor]:
    draw = torch.Generator().manual_seed(1)
    bare = Bare(Shape(h=HEADS, g=HEADS, q=TOKENS, k=TOKENS), dtype=torch.float64, rules=())
    params = parameters(method, bare.shape.layer, torch.float64)
    scores = 2 * torch.randn(2, HEADS, TOKENS, TOKENS, generator=draw, dtype=torch.float64)
    return replace(bare.call, params=params, mask=Mask()), scores


def _by_hand(row: Tensor, p: dict[str, Tensor], head: int, columns: list[int]) -> Tensor:
    """The weights of a row of the scores of `columns`."""
    waves, rank, _ = p["cos"][head].shape
    units = []
    for r in range(rank):
        total = torch.zeros((), dtype=torch.float64)
        for score, column in zip(row, columns, strict=True):
            for m in range(waves):
                total = total + p["cos"][head, m, r, column] * torch.cos((m + 1) * score)
                total = total + p["sin"][head, m, r, column] * torch.sin((m + 1) * score)
        units.append(total)
    return torch.stack([sum(p["out"][head, column, r] * units[r] for r in range(rank)) for column in columns])


@pytest.mark.parametrize("method", [KolmogorovArnoldAttention(5, 2, 3), KolmogorovArnoldAttention(7, 3, 1)])
def test_waves_of_a_row_make_its_weights(method: KolmogorovArnoldAttention) -> None:
    call, scores = _set_up(method)
    p = dict(call.params)
    leaves = [x.requires_grad_() for x in (scores, *p.values())]
    found = method.wave(scores, call)
    every = list(range(TOKENS))
    wanted = torch.stack(
        [torch.stack([torch.stack([_by_hand(r, p, h, every) for r in x[h]]) for h in range(HEADS)]) for x in scores]
    )
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_a_tile_has_the_waves_of_its_columns_and_what_is_hidden_has_none() -> None:
    method = KolmogorovArnoldAttention(TOKENS, 2, 2)
    call, scores = _set_up(method)
    p, row = dict(call.params), scores[0, 1, 0]
    for cols, columns in ((slice(1, 4), [1, 2, 3]), (torch.tensor([0, 4]), [0, 4])):
        found = method.wave(scores[..., columns], replace(call, cols=cols))
        assert close(found[0, 1, 0], _by_hand(row[columns], p, 1, columns))
    keep = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)
    hidden = scores.masked_fill(~keep, torch.finfo(torch.float64).min)
    found = method.wave(hidden, replace(call, keep=keep.expand(1, 1, TOKENS, TOKENS)))
    others = [0, 1, 3, 4]
    assert close(found[0, 1, 0, others], _by_hand(row[others], p, 1, others))


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(KolmogorovArnoldAttention.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=20)
    before = torch.get_rng_state()
    found, again = (KolmogorovArnoldAttention(60, 20, 5).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "cos": (4, 5, 20, 60), "sin": (4, 5, 20, 60), "out": (4, 60, 20),
    }  # fmt: skip
    other = KolmogorovArnoldAttention(60, 20, 5).parameters(replace(layer, number=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])
    for name in ("cos", "sin"):
        assert 0.98 < float(found[name].std()) * math.sqrt(300) < 1.02
    assert 0.99 < float(found["out"].max()) * math.sqrt(20) <= 1
    assert -1 <= float(found["out"].min()) * math.sqrt(20) < -0.99


def test_what_cannot_be() -> None:
    assert KolmogorovArnoldAttention() == KolmogorovArnoldAttention(197, 12, 3)
    assert KolmogorovArnoldAttention.example() == KolmogorovArnoldAttention(24, 4, 2)
    assert KolmogorovArnoldAttention(1, 1, 1).rank == 1
    for name, good in (("tokens", 197), ("rank", 12), ("waves", 3)):
        with pytest.raises(FieldError, match=rf"{name} = 0: must be 1 or more; .*{good}"):
            KolmogorovArnoldAttention(**{name: 0})
    method = KolmogorovArnoldAttention(TOKENS - 1)
    call, scores = _set_up(method)
    with pytest.raises(SiteError, match="layer 0: has waves for 4 tokens, and there are more"):
        method.wave(scores, call)
