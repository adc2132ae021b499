"""Combiner against the paper's probabilities, pair by pair: of a block, and of a token in its block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import Combiner
from tests.by_hand import in_pieces
from tests.methods.linear import Text, agrees, drawn, read

SIZE = 4


def _params() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(8, 8, generator=draw, dtype=torch.float64) / 2 for name in ("query", "key")}


def _highest(net: Tensor, rows: list[Tensor]) -> Tensor:
    return torch.stack([(net @ x).clamp(min=0) for x in rows]).max(0).values


def _weights(text: Text, p: dict[str, Tensor], size: int) -> Tensor:
    """Every token's weight for every token `[n n]`, of which softmax's would be one sum."""
    n = len(text.k)
    blocks = [list(range(a, min(a + size, n))) for a in range(0, n, size)]
    rows = []
    for i in range(n):
        mine = i // size
        near = [j for j in blocks[mine] if j <= i or not text.causal]
        far = [m for m in range(len(blocks)) if m < mine or not text.causal]
        q = text.q[i] * text.scale
        joint = torch.stack(
            [q @ text.k[j] for j in near] + [q @ _highest(p["key"], [text.k[j] for j in blocks[m]]) for m in far]
        )
        joint = joint.softmax(0)
        row = [torch.zeros((), dtype=torch.float64)] * n
        for w, j in zip(joint[: len(near)], near, strict=True):
            row[j] = row[j] + w
        for w, m in zip(joint[len(near) :], far, strict=True):
            lead = _highest(p["query"], [text.q[j] * text.scale for j in blocks[m]])
            within = torch.stack([lead @ text.k[j] for j in blocks[m]]).softmax(0)
            for part, j in zip(within, blocks[m], strict=True):
                row[j] = row[j] + w * part
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_then_a_token_in_it(causal: bool, padded: bool) -> None:
    params = _params()
    agrees(
        Combiner(SIZE), lambda text: _weights(text, params, SIZE) @ text.v, causal, padded, params=params,
        shape=Shape(dv=6),
    )  # fmt: skip


def test_every_token_so_far_has_a_weight_and_they_add_up_to_one() -> None:
    bare, call = drawn(causal=True, padded=False)
    values = torch.eye(19, dtype=torch.float64).expand(2, 2, -1, -1)
    found = Combiner(SIZE).attend((bare.q, bare.k, values), replace(call, params=_params()))
    assert close(found.sum(-1), torch.ones(2, 4, 19, dtype=torch.float64))
    assert bool((found > 0)[..., torch.ones(19, 19).tril().bool()].all())
    assert not bool(found[..., torch.ones(19, 19).tril() == 0].any())


def test_one_block_is_softmax() -> None:
    bare, call = drawn(causal=True, padded=False)
    found = Combiner(19).attend((bare.q, bare.k, bare.v), replace(call, params=_params()))

    def by_hand(text: Text) -> Tensor:
        rows = [(text.k[: i + 1] @ text.q[i] * text.scale).softmax(0) @ text.v[: i + 1] for i in range(19)]
        return torch.stack(rows)

    assert close(found, read(bare, call, by_hand)[0])


def test_call_by_call() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=17)["input_ids"]
    with attach(model, Combiner(SIZE)) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        parts, _ = in_pieces(run, ids, (6, 1, 1, 9))
    assert close_model(parts, whole)


def test_queries_that_nobody_kept_are_left_out_of_the_summary() -> None:
    """The first 6 of 19 tokens were read without it: their blocks are a plain mean, and a half known one."""
    bare, call = drawn(causal=True, padded=False)
    late = replace(call, queries=Positions.row(6, 13), params=_params(), state=State())
    found = Combiner(SIZE).attend((bare.q[:, :, 6:], bare.k, bare.v), late)

    def by_hand(text: Text) -> Tensor:
        lost = torch.cat([torch.zeros_like(text.q[:6]), text.q[6:]])
        return _weights(replace(text, q=lost), _params(), SIZE) @ text.v

    assert close(found, read(bare, call, by_hand)[0][:, :, 6:])


def test_the_start_and_errors() -> None:
    layer = Layer(0, 4, 2, 64, 64, 32)
    p, again = Combiner().parameters(layer), Combiner().parameters(layer)
    assert set(p) == {"query", "key"}
    for name, net in p.items():
        assert net.shape == (64, 64)
        assert torch.equal(net, again[name])
        assert not torch.equal(net, Combiner().parameters(replace(layer, number=1))[name])
        assert 0.12 < float(net.max()) <= 0.125
        assert -0.125 <= float(net.min()) < -0.12
    assert not torch.equal(p["query"], p["key"])
    with pytest.raises(FieldError, match=r"Combiner.block = 0: must be 1 or more"):
        Combiner(0)
    bare = Bare(dtype=torch.float64)
    index = torch.tensor([[list(range(1, 20))]])
    with pytest.raises(SiteError, match="layer 0: blocks need all tokens of a text; keep the cache whole"):
        Combiner(4).attend((bare.q, bare.k, bare.v), replace(bare.call, keys=Positions(index, index)))
