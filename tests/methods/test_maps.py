"""MAPS against the paper's formula in loops, on small models whose weights are written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, RefusedModel, StatisticError
from heedful.methods.explain.maps import MAPS

SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
PAIRS = ((3, 9), (7, 7), (20, 1), (4, 30), (11, 2), (8, 8))


def llama(**kw: Any) -> Any:
    torch.manual_seed(5)
    model = models.tiny("llama", tie_word_embeddings=False, vocab_size=40, **{**SIZES, **kw})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))  # norms and tables that are unlike 1 and unlike each other
    return model


@torch.no_grad()
def by_hand(model: Any, pairs: Any, k: int) -> tuple[Tensor, Tensor]:
    """Shares of pairs, head by head and pair by pair."""
    base, heads = model.model, model.config.num_attention_heads
    group, d = heads // model.config.num_key_value_heads, model.config.head_dim
    up, down = torch.zeros(2, len(base.layers), heads, dtype=torch.float64)
    first = base.layers[0]
    for n, layer in enumerate(base.layers):
        for h in range(heads):
            g = h // group
            v = layer.self_attn.v_proj.weight[g * d : (g + 1) * d]
            o = layer.self_attn.o_proj.weight[:, h * d : (h + 1) * d]
            for source, target in pairs:
                x = base.embed_tokens.weight[source]
                if n > 0:
                    x = first.mlp(first.post_attention_layernorm(x))
                row = [float(u @ (o @ (v @ x))) for u in model.lm_head.weight]
                up[n, h] += sum(other > row[target] for other in row) < k
                down[n, h] += sum(other < row[target] for other in row) < k
    return up / len(pairs), down / len(pairs)


@pytest.mark.parametrize("k", [1, 10, 33])
def test_every_head_has_the_share_that_loops_give(k: int) -> None:
    model = llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = heedful.fit(MAPS(PAIRS, k=k), model, ())
    up, down = by_hand(model, PAIRS, k)
    assert close(found.scores, up)
    assert close(found.suppression, down)
    assert k == 1 or len(found.scores.unique()) > 2  # unlike heads
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_head_that_copies_is_found_and_one_that_suppresses_too(sign: float) -> None:
    torch.manual_seed(0)
    model = models.tiny("llama", tie_word_embeddings=False, num_hidden_layers=2, hidden_size=64, num_attention_heads=2,
                        num_key_value_heads=2, head_dim=64, vocab_size=150)  # fmt: skip
    base = model.model
    with torch.no_grad():
        for layer in base.layers:
            layer.self_attn.v_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        base.layers[1].self_attn.v_proj.weight[64:].copy_(torch.eye(64))
        base.layers[1].self_attn.o_proj.weight[:, 64:].copy_(sign * torch.eye(64))
        x = base.embed_tokens.weight
        moved = base.layers[0].mlp(base.layers[0].post_attention_layernorm(x))
        model.lm_head.weight.copy_(moved / moved.norm(dim=1, keepdim=True))
    found = heedful.fit(MAPS(), model, ())  # no pairs: copying
    shares, other = (found.scores, found.suppression) if sign > 0 else (found.suppression, found.scores)
    assert shares[1, 1] == 1.0
    assert other[1, 1] == 0.0
    # heads of nothing leave all tokens level, and a token that stands level is not above the target
    assert (shares[0] == 1.0).all()


def test_without_pairs_tokens_are_spread_over_the_vocabulary() -> None:
    model = llama(num_hidden_layers=1)
    size = len(model.lm_head.weight)
    ids = sorted({int(i * (size - 1) / (min(size, 100) - 1)) for i in range(min(size, 100))})
    spread = heedful.fit(MAPS(k=5), model, ())
    assert close(spread.scores, heedful.fit(MAPS(tuple((i, i) for i in ids), k=5), model, ()).scores)


def test_a_gpt2_with_a_layer_norm_and_positions() -> None:
    torch.manual_seed(1)
    model = models.tiny("gpt2")
    block, pairs = model.transformer.h, ((3, 9), (7, 7), (20, 1), (4, 30))
    width, heads = model.config.n_embd, model.config.n_head
    d, own = width // heads, model.transformer.wte.weight
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        found = heedful.fit(MAPS(pairs, k=7), model, ())
        want = torch.zeros(len(block), heads, dtype=torch.float64)
        for n, layer in enumerate(block):
            v, o = layer.attn.c_attn.weight[:, 2 * width :], layer.attn.c_proj.weight
            for h in range(heads):
                piece = slice(h * d, (h + 1) * d)
                for source, target in pairs:
                    x = own[source] if n == 0 else block[0].mlp(block[0].ln_2(own[source]))
                    row = x @ v[:, piece] @ o[piece] @ own.T
                    want[n, h] += float((row > row[target]).sum() < 7) / len(pairs)
    assert close(found.scores, want)


def test_what_it_shows() -> None:
    model = llama()
    found = heedful.fit(MAPS(PAIRS, "swapping", k=10, does=0.3), model, ())
    up, down = by_hand(model, PAIRS, 10)
    told = found.describe()
    assert [figure.key for figure in told.figures] == ["maps-swapping", "maps-not-swapping"]
    assert close(told.figures[0].values, up)
    assert close(told.figures[1].values, down)
    assert [(f.low, f.high) for f in told.figures] == [(0, 1), (0, 1)]
    assert "raise" in told.figures[0].what
    assert "lower" in told.figures[1].what
    want = {(n, h): float(up[n, h]) for n in range(3) for h in range(4) if up[n, h] >= 0.3}
    (role,) = told.roles
    assert role.heads == pytest.approx(want)
    assert list(role.heads.values()) == sorted(role.heads.values(), reverse=True)
    assert f"{len(want)} of 12 heads" in told.findings[0].text
    assert told.findings[0].methods == ("Patch",)
    n, h = divmod(int(up.flatten().argmax()), 4)
    assert f"head {n}.{h} does swapping for {up.max():.0%} of pairs" in told.findings[0].text


def test_a_share_that_is_just_reached_counts() -> None:
    model = llama()
    share = float(by_hand(model, PAIRS[:4], 10)[0].max())  # of four pairs, so without a rounding
    told = heedful.fit(MAPS(PAIRS[:4], k=10, does=share), model, ()).describe()
    assert len(told.roles[0].heads) >= 1


def test_it_is_a_measure_of_a_diagnosis() -> None:
    model = llama()
    profile = heedful.diagnose(model, torch.arange(5, 25), measures=[MAPS(PAIRS, k=10)])
    assert close(profile.figures()["maps-copying"].values, by_hand(model, PAIRS, 10)[0])


def test_says_what_is_wrong() -> None:
    for wrong in ({"pairs": ((1, 2, 3),)}, {"pairs": ((-1, 2),)}, {"k": 0}, {"does": 0.0}, {"does": 1.1}):
        with pytest.raises(FieldError, match=next(iter(wrong))):
            MAPS(**wrong)
    assert MAPS(((0, 0),), k=1, does=1.0).pairs == ((0, 0),)
    model = llama()
    size = len(model.lm_head.weight)
    heedful.fit(MAPS(((0, size - 1),)), model, ())
    with pytest.raises(FieldError, match=f"ids below {size}"):
        heedful.fit(MAPS(((size, 0),)), model, ())
    with pytest.raises(StatisticError, match=r"heedful\.fit"):
        MAPS().describe()
    with pytest.raises(RefusedModel, match="unembedding"):
        heedful.fit(MAPS(), models.tiny("bert").base_model, ())
