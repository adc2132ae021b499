"""Slices of scores: against the singular vectors of the whole product, biases, rotations, padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.explain.sparse_attention_decomposition import SparseAttentionDecomposition as Slices

IDS = torch.tensor([[5, 17, 9, 88, 40, 23, 61, 33, 70]])


def counted(model, method: Slices, **inputs) -> Tensor:
    with heedful.attach(model, method) as run, torch.no_grad():
        run(**inputs)
    return run[method]


def states(model, name: str, ids: Tensor) -> dict[int, Tensor]:
    """What goes into each attention's query projection."""
    seen: dict[int, Tensor] = {}
    hooks = [
        model.get_submodule(name.format(i)).register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0]}))
        for i in range(2)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def by_the_authors_rule(products: Tensor, share: float) -> int:
    """Their loop: the first place where the sorted sum is at least the share of the whole."""
    ordered, total = products.sort(descending=True).values, products.sum()
    for i in range(len(ordered)):
        if ordered[: i + 1].sum() / total >= share - 1e-12:
            return i + 1
    raise AssertionError


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_are_the_singular_vectors_of_the_whole_product(kind: str, share: float) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    rotary = kind == "llama"
    method = heedful.fit(Slices(fires=0.25, share=share), model, ())
    found = counted(model, method, input_ids=IDS)
    with torch.no_grad():
        maps = model(input_ids=IDS, output_attentions=True).attentions
    path = "model.layers.{}.self_attn.q_proj" if rotary else "bert.encoder.layer.{}.attention.self.query"
    inputs, d, counts = states(model, path, IDS), 8, torch.zeros(2, 2, 4, dtype=torch.float64)
    if rotary:
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(9)[None])
        half = torch.zeros(d, d)
        half[: d // 2, d // 2 :], half[d // 2 :, : d // 2] = -torch.eye(d // 2), torch.eye(d // 2)
        turns = [torch.diag(c) + torch.diag(s) @ half for c, s in zip(cos[0], sin[0], strict=True)]
    for layer in range(2):
        query = model.get_submodule(path.format(layer))
        key = model.get_submodule(path.format(layer).replace("q_proj", "k_proj").replace("query", "key"))
        x = inputs[layer][0].double()
        x = x if rotary else torch.cat([x, torch.ones(9, 1)], 1)
        sides = [
            m.weight if rotary else torch.cat([m.weight, m.bias[:, None]], 1) for m in (query, key)
        ]  # [heads * d, e]
        w_q, w_k = (side.detach().double().view(-1, d, x.shape[1]) for side in sides)
        for head, i, j in (maps[layer][0] >= 0.25).nonzero().tolist():
            between = turns[i].T.double() @ turns[j].double() if rotary else torch.eye(d, dtype=torch.float64)
            product = w_q[head].T @ between @ w_k[head // (4 // len(w_k))]
            u, s, v = torch.linalg.svd(product)
            terms = (x[i] @ u[:, :d]) * s[:d] * (v[:d] @ x[j])
            if j > 0 and terms.sum() > 0:
                counts[0, layer, head] += by_the_authors_rule(terms, share)
                counts[1, layer, head] += 1
    assert counts[1].sum() > 10
    wanted = counts[0] / counts[1]
    assert torch.equal(found.isnan(), wanted.isnan())
    assert close(found.nan_to_num(), wanted.nan_to_num())


def test_slices_add_up_to_the_score_whatever_they_are() -> None:
    model = models.tiny("llama")
    fitted = heedful.fit(Slices(), model, ())
    drawn = torch.Generator().manual_seed(1)
    seen = {}

    class Spy(Slices):
        paper = Slices.paper

        def _terms(self, q, k, positions, call):
            out = super()._terms(q, k, positions, call)
            seen[call.layer] = (out.sum(-1), (q * k).sum(-1))
            return out

    ids = torch.randint(3, 127, (2, 12), generator=drawn)
    for method in (Spy(fires=0.2, factors=fitted.factors), Spy(fires=0.2, seed=3)):
        counted(model, method, input_ids=ids)
        for total, score in seen.values():
            assert close(total.float(), score.float(), roundings=1024)


def test_padding_and_tiles_change_nothing() -> None:
    model = models.tiny("llama")
    method = heedful.fit(Slices(fires=0.2), model, ())
    alone = counted(model, method, input_ids=IDS)
    pad = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = counted(model, method, input_ids=torch.cat([pad, IDS], 1), attention_mask=mask, position_ids=positions)
    with heedful.attach(model, method, tile_rows=2, backend="tiled") as run, torch.no_grad():
        run(input_ids=IDS)
    assert torch.equal(alone.nan_to_num(), padded.nan_to_num())
    assert torch.equal(alone.nan_to_num(), run[method].nan_to_num())
    assert [f.key for f in method.describe(alone).figures] == ["slices"]


def test_says_what_is_wrong() -> None:
    model = models.tiny("llama")
    for bad in ({"fires": 0.0}, {"share": 1.5}):
        with pytest.raises(FieldError, match="must be above 0"):
            Slices(**bad)
    other = heedful.fit(Slices(fires=0.2), models.tiny("odd_head_dim"), ())
    for method, match in (
        (Slices(fires=0.2), "must be fitted"),
        (other, "another model"),
        (Slices(seed=0).on(heads=[1]), "all heads"),
    ):
        run = heedful.attach(model, method)
        with run, torch.no_grad(), pytest.raises(FieldError, match=match):
            run(input_ids=IDS)


def test_random_axes_are_the_seeds_own() -> None:
    q, k = (torch.randn(5, 8, dtype=torch.float64) for _ in range(2))
    for layer in (0, 1):
        draw = torch.Generator().manual_seed(4099 * 3 + layer)
        axes = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64)).Q
        found = Slices(seed=3)._terms(q, k, (q,) * 5, replace(Bare().call, layer=layer))
        assert close(found, torch.stack([(q @ a) * (k @ a) for a in axes.T], 1), roundings=1024)
