"""`heedful.nn.Attention(rotary=...)`: its angles, its caches, and methods that ask for what is before it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, RefusedModel, SiteError
from heedful.methods import AttentionProfile, EfficientAttention, SinkWindow, ThresholdRelativeAttention
from heedful.nn import Attention
from heedful.nn.rotary import turned

E, H, B, N = 32, 4, 2, 9


def made(**how: object) -> Attention:
    torch.manual_seed(1)
    return Attention(E, H, causal=True, batch_first=True, **how).eval()  # type: ignore[arg-type]


def x(tokens: int = N) -> Tensor:
    return torch.randn(B, tokens, E, generator=torch.Generator().manual_seed(2))


def heard(module: Attention, x: Tensor, **how: object) -> Tensor:
    with torch.no_grad():
        return module(x, x, x, need_weights=False, **how)[0]  # type: ignore[arg-type]


def test_pairs_turn_by_their_angle() -> None:
    given, places = torch.randn(1, 2, 3, 6), torch.tensor([[[4, 5, 9]]])
    found = turned(given, places, 100.0)
    for head in range(2):
        for i, place in enumerate((4, 5, 9)):
            for j in range(3):
                pair = complex(given[0, head, i, j], given[0, head, i, j + 3])
                want = pair * torch.polar(torch.tensor(1.0), torch.tensor(place * 100.0 ** (-j / 3))).item()
                got = complex(found[0, head, i, j], found[0, head, i, j + 3])
                assert abs(got - want) < 1e-5


def test_angles_are_told_apart_far_into_a_text_in_half_precision() -> None:
    given, places = torch.randn(1, 1, 2, 8).bfloat16(), torch.tensor([[[30_001, 30_002]]])
    found, want = turned(given, places, 10_000.0), turned(given.float(), places, 10_000.0)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - want).abs().max()) < 0.05


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_llama_s(kv_heads: int) -> None:
    module = made(kv_heads=kv_heads, rotary=500.0, bias=False)
    config = LlamaConfig(
        hidden_size=E, num_attention_heads=H, num_key_value_heads=kv_heads, head_dim=E // H, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    other = LlamaAttention(config, 0).eval()
    for mine, theirs in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
        getattr(other, theirs).weight.data.copy_(getattr(module, mine).weight)
    angles = LlamaRotaryEmbedding(config)(x(), torch.arange(N)[None])
    with torch.no_grad():
        want = other(x(), position_embeddings=angles, attention_mask=None)[0]
    assert close(heard(module, x()), want)
    assert not close(heard(made(kv_heads=kv_heads, bias=False), x()), want)


@pytest.mark.parametrize("method", [None, SinkWindow(sinks=2, window=4), EfficientAttention()])
def test_step_by_step_is_the_whole(method: object) -> None:
    module = made(rotary=100.0, method=method)
    whole, cache, parts = heard(module, x()), DynamicCache(), []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, N)):
        parts.append(heard(module, x()[:, start:stop], cache=cache))
    assert close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("method", [None, AttentionProfile(), ThresholdRelativeAttention(), EfficientAttention()])
def test_empty_room_of_a_static_cache_is_not_seen(method: object) -> None:
    module, config = made(rotary=100.0, method=method), LlamaConfig(num_hidden_layers=1)
    whole, cache, parts = heard(module, x()), StaticCache(config, max_cache_len=N + 4), []
    for start, stop in ((0, 4), (4, 5), (5, N)):
        parts.append(heard(module, x()[:, start:stop], cache=cache))
    assert close(torch.cat(parts, 1), whole)


def test_a_cache_that_forgets_is_refused() -> None:
    config = MistralConfig(num_hidden_layers=1, sliding_window=4)
    for cache in (DynamicCache(config=config), StaticCache(config, max_cache_len=N)):
        module = made(rotary=100.0)
        for start in range(4):
            heard(module, x()[:, start : start + 1], cache=cache)
        with pytest.raises(RefusedModel, match="forgets what slides out of a window"):
            heard(module, x()[:, 4:5], cache=cache)


def test_beams_take_their_keys_along() -> None:
    module, cache, order = made(rotary=100.0), DynamicCache(), torch.tensor([1, 0])
    heard(module, x()[:, :6], cache=cache)
    cache.reorder_cache(order)
    assert close(heard(module, x()[order, 6:], cache=cache), heard(module, x())[order, 6:])


def test_padding_on_the_left_moves_nothing() -> None:
    module = made(rotary=100.0)
    padded = torch.cat([torch.zeros(B, 3, E), x()], 1)
    hidden = torch.arange(N + 3).expand(B, -1) < 3
    assert close(heard(module, padded, key_padding_mask=hidden)[:, 3:], heard(module, x()))


def test_what_replaces_it_is_handed_what_is_before_it() -> None:
    before, still = made(rotary=100.0, method=ThresholdRelativeAttention()), made(method=ThresholdRelativeAttention())
    assert torch.equal(heard(before, x()), heard(still, x()))
    plain, cache = made(rotary=100.0), DynamicCache()
    heard(plain, x()[:, :4], cache=cache)
    with pytest.raises(SiteError, match="the cache holds keys with the rotary embedding in them"):
        heard(before, x()[:, 4:5], cache=cache)
    cache = DynamicCache()
    heard(before, x()[:, :4], cache=cache)
    with pytest.raises(RefusedModel, match="keys from before the rotary embedding"):
        heard(plain, x()[:, 4:5], cache=cache)


def test_methods_can_turn_what_they_make() -> None:
    """`call.rotate` is the embedding of the call's own queries."""
    from heedful import Method, Site
    from heedful.authoring import Call, at
    from tests.samples import PAPER

    class Turned(Method):
        paper = PAPER

        @at(Site.QUERY)
        def turn(self, query: Tensor, call: Call) -> Tensor:
            assert call.rotate is not None
            assert close(call.rotate(torch.ones_like(query)), turned(torch.ones_like(query), call.q_pos, 100.0))
            return 2 * query

    module, cache = made(rotary=100.0, method=Turned()), DynamicCache()
    for start, stop in ((0, 4), (4, 6)):
        heard(module, x()[:, start:stop], cache=cache)


def test_it_learns_is_copied_and_told() -> None:
    module = made(rotary=100.0, method=AttentionProfile())
    assert torch.equal(heard(copy.deepcopy(module), x()), heard(module, x()))
    assert "rotary=100" in repr(module)
    assert "rotary" not in repr(made())
    given = x().requires_grad_()
    module(given, given, given, need_weights=False)[0].sum().backward()
    assert given.grad is not None
    assert bool(given.grad.isfinite().all())


def test_what_cannot_be_turned_is_named() -> None:
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(FieldError, match="rotary"):
            made(rotary=wrong)
    with pytest.raises(FieldError, match="turns pairs, and a head has 9 dimensions"):
        Attention(36, 4, rotary=10.0)
    module = Attention(E, H, rotary=100.0, batch_first=True)
    with pytest.raises(FieldError, match="another sequence has places of its own"):
        module(x(), x(5), x(5))
