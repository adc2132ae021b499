"""SLA: the three kinds of blocks and what is made of them, against loops over single tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask, Padding
from heedful.core.positions import Positions
from heedful.methods import SLA
from heedful.methods.sparse.prefill._pooled import Pooled
from tests.images_by_hand import learns_of_an_image

CASES = [(18, 4, 1, 1), (16, 4, 1, 2), (19, 2, 3, 0), (7, 8, 1, 0), (12, 3, 2, 2)]  # tokens, size, exact, skipped


def _bare(n: int) -> Bare:
    return Bare(Shape(q=n, k=n, dv=6), dtype=torch.float64, rules=())


def _params() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {
        "map": torch.randn(6, 6, generator=draw, dtype=torch.float64),
        "bias": torch.randn(6, generator=draw, dtype=torch.float64),
    }


def _by_hand(bare: Bare, p: dict[str, Tensor], size: int, exact: int, skipped: int) -> Tensor:
    s = bare.shape
    blocks = [list(range(s.q)[i : i + size]) for i in range(0, s.q, size)]
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b in range(s.b):
        for h in range(s.h):
            q, k, v = bare.q[b, h], bare.k[b, h // 2], bare.v[b, h // 2]
            for block in blocks:
                mean = sum(q[i] for i in block) / len(block)
                suits = [(mean @ (sum(k[j] for j in other) / len(other))).item() for other in blocks]
                order = sorted(range(len(blocks)), key=lambda n, suits=suits: -suits[n])
                seen = sorted(j for n in order[:exact] for j in blocks[n])
                between = [j for n in order[exact : len(blocks) - skipped] for j in blocks[n]]
                for i in block:
                    weights = torch.stack([q[i] @ k[j] / 8**0.5 for j in seen]).softmax(0)
                    linear = torch.zeros(s.dv, dtype=torch.float64)
                    if between:
                        like = torch.stack([q[i].softmax(0) @ k[j].softmax(0) for j in between])
                        linear = (like / like.sum()) @ v[between]
                    out[b, h, i] = weights @ v[seen] + p["map"] @ linear + p["bias"]
    return out


@pytest.mark.parametrize(("n", "size", "exact", "skipped"), CASES)
def test_blocks_are_exact_or_linear_or_skipped(n: int, size: int, exact: int, skipped: int) -> None:
    bare, params = _bare(n), _params()
    many = -(-n // size)
    method = SLA((exact + 0.5) / many if exact < many else 0.999, (skipped + 0.5) / many if skipped else 0.0, size)
    want = _by_hand(bare, params, size, exact, skipped)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(method, backend, rows, params)
        assert close(found, want)


def test_one_block_is_exact_where_the_share_is_none() -> None:
    bare, params = _bare(18), _params()
    found, _ = bare.run(SLA(0.01, 0.0, 4), "reference", params=params)
    assert close(found, _by_hand(bare, params, 4, 1, 0))


def test_the_first_steps_loss_and_gradient_are_those_of_the_loops() -> None:
    bare, params = _bare(18), _params()
    leaves = [*params.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    heads = bare.run(SLA(0.3, 0.2, 4), "reference", params=params)[0]
    losses = [(x - 1).square().mean() for x in (heads, _by_hand(bare, params, 4, 1, 1))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_it_begins_as_the_exact_blocks_alone_and_learns() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=8, value_dim=6, width=32)
    found = SLA().parameters(layer)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"map": (6, 6), "bias": (6,)}
    assert not any(bool(x.any()) for x in found.values())
    assert torch.equal(SLA(start=0.5).parameters(layer)["map"], torch.eye(6) / 2)
    learns_of_an_image(SLA.example())


def test_skipped_columns_are_not_computed() -> None:
    bare = Bare(Shape(q=32, k=32, b=1, h=1, g=1), rules=())
    bare.q[:], bare.k[:] = 1.0, 0.0
    bare.k[:, :, 8:16] = 1.0
    call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    mask = SLA(0.25, 0.0, 8).skip(call.mask, call)
    assert mask.columns(call.queries.take(slice(0, 8)), call.keys, slice(0, 8)) == ((8, 16),)


def test_where_plain_attention_stays() -> None:
    call = _bare(8).call
    assert not SLA().idle(call)
    assert SLA(1.0).idle(call)
    text = torch.ones(2, 8, dtype=torch.bool)
    for change in (
        {"cross": True}, {"mask": Mask((Causal(),))}, {"mask": Mask((Padding(text),))}, {"queries": Positions.row(7, 1)}
    ):  # fmt: skip
        assert SLA().idle(replace(call, **change)), change


def test_what_cannot_be() -> None:
    for field, value in (("exact", 0.0), ("exact", 1.1), ("skipped", -0.1), ("skipped", 1.1), ("block", 0)):
        with pytest.raises(FieldError, match=rf"SLA\.{field} = {value}"):
            SLA(**{field: value})
    assert SLA() == SLA(0.05, 0.1, 64, 0.0)
    assert SLA.neutral().exact == 1.0
    assert SLA.example() == SLA(0.3, 0.3, 4, 0.5)
    with pytest.raises(SiteError, match="queries, keys and values are known from MASK on"):
        Pooled(_bare(8).call, 4)
