"""BOAT: halvings, what each part sees of its other half, and tokens off the grid, against loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask
from heedful.core.regions import Region
from heedful.methods import BOAT

BEFORE = 2  # tokens before the patches


def _bare(grid: tuple[int, int], spans: tuple[tuple[int, int], ...] | None = None) -> Bare:
    n = BEFORE + math.prod(grid) + 1
    bare = Bare(Shape(q=n, k=n, dv=6), dtype=torch.float64, rules=())
    region = Region(((BEFORE, n - 1),) if spans is None else spans, grid)
    bare.call = replace(bare.call, roles={"patches": region}, mask=Mask())
    return bare


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def _halved(query: dict[int, Tensor], tokens: list[int]) -> list[int]:
    """Tokens in their new order: those that are nearer to the second of two centres first."""
    half = len(tokens) // 2
    centres = [_unit(torch.stack([query[i] for i in part]).mean(0)) for part in (tokens[:half], tokens[half:])]
    for _ in range(2):
        shares = {i: torch.stack([100 * _unit(query[i]) @ c for c in centres]).softmax(0) for i in tokens}
        centres = [_unit(sum(shares[i][n] * query[i] for i in tokens)) for n in range(2)]  # type: ignore[arg-type]
    one, other = centres
    return sorted(tokens, key=lambda i: float((_unit(query[i]) @ one + 1) / (_unit(query[i]) @ other + 1)))


def _by_hand(bare: Bare, patches: list[int], halvings: int, overlap: int) -> Tensor:
    s = bare.shape
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    others = [i for i in range(s.q) if i not in patches]
    for b in range(s.b):
        for h in range(s.h):
            q, k, v = bare.q[b, h], bare.k[b, h // 2], bare.v[b, h // 2]
            query = {i: q[i].detach() for i in patches}
            parts = [patches]
            for _ in range(halvings):
                sorted_parts = [_halved(query, part) for part in parts]
                parts = [half for p in sorted_parts for half in (p[: len(p) // 2], p[len(p) // 2 :])]
            seen = {i: list(range(s.q)) for i in others}
            for first, second in zip(parts[::2], parts[1::2], strict=True):
                seen |= dict.fromkeys(first, first + second[:overlap] + others)
                seen |= {i: (first[-overlap:] if overlap else []) + second + others for i in second}
            for i, keys in seen.items():
                weights = torch.stack([q[i] @ k[j] / 8**0.5 for j in keys]).softmax(0)
                out[b, h, i] = weights @ v[keys]
    return out


@pytest.mark.parametrize(
    ("grid", "halvings", "overlap"),
    [((4, 4), 1, 0), ((4, 6), 2, 0), ((4, 6), 2, 2), ((4, 4), 3, 1), ((2, 4), 1, 9), ((4, 6), 2, 9)],
)
def test_each_part_sees_itself_and_the_near_end_of_the_other_half(
    grid: tuple[int, int], halvings: int, overlap: int
) -> None:
    bare = _bare(grid)
    want = _by_hand(bare, list(range(BEFORE, BEFORE + math.prod(grid))), halvings, overlap)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(BOAT(halvings, overlap), backend, rows)
        assert close(found, want)


def test_patches_may_stand_in_several_spans() -> None:
    bare = _bare((2, 4), ((1, 5), (6, 10)))
    found, _ = bare.run(BOAT(1, 1), "reference")
    assert close(found, _by_hand(bare, [1, 2, 3, 4, 6, 7, 8, 9], 1, 1))


def test_alike_patches_meet_wherever_they_stand() -> None:
    query = normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]).repeat(8, 1), dim=-1)[None, None]
    order = BOAT(1, 0).order(query + 0.01 * torch.arange(16.0)[:, None] / 16)
    assert {frozenset(half.tolist()) for half in order[0, 0].chunk(2)} == {
        frozenset(range(0, 16, 2)), frozenset(range(1, 16, 2))
    }  # fmt: skip


def test_an_image_model_is_served_and_gradients_pass() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    with attach(model, BOAT.example()) as run:
        assert run.difference(**inputs) > 0
        run(**inputs).logits.square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_where_plain_attention_stays_and_what_cannot_be() -> None:
    call = _bare((3, 4)).call
    assert not BOAT().idle(call)
    assert BOAT().idle(replace(call, mask=Mask((Causal(),))))
    with pytest.raises(FieldError, match=r"halvings = 0: must be 1 or more"):
        BOAT(0)
    with pytest.raises(FieldError, match=r"overlap = -1: must be 0 or more"):
        BOAT(1, -1)
    assert BOAT() == BOAT(2, 20)
    assert BOAT(1, 0).overlap == 0
    assert BOAT.example() == BOAT(2, 1)
    with pytest.raises(SiteError, match="sorted by queries, and it is handed none"):
        BOAT().narrow(call.mask, call)
    with pytest.raises(FieldError, match=r"halvings = 3: must halve the 3 x 4 patches of layer 0 without a rest; .*1"):
        BOAT(3).narrow(call.mask, replace(call, query=torch.zeros(2, 4, 15, 8)))
