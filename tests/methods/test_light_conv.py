"""LightConv and what it shares with DynamicConv: windows, padding, the cache."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Layer, Method
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.methods.mechanisms.local.dynamic_conv import DynamicConv
from heedful.methods.mechanisms.local.light_conv import LightConv
from tests.methods.conv import block_of, embedded, gated, trained

BOTH = (LightConv((2, 3)), DynamicConv((2, 3)), DynamicConv((5,), heads=2), LightConv((4,), heads=8))


def _by_loops(x: Tensor, p: dict[str, Tensor], causal: bool = True) -> Tensor:
    """One text `[n e]`, token by token and channel by channel."""
    z = gated(x, p)
    n, e = z.shape
    h, kernel = p["kernel"].shape
    shift = 0 if causal else kernel // 2  # of an odd kernel
    out = torch.zeros_like(z)
    for c in range(e):
        w = p["kernel"][c // (e // h)].exp()
        w = w / w.sum()
        for t in range(n):
            for back in range(kernel):  # the last weight is the token's own
                s = t - back + shift
                if 0 <= s < n:
                    out[t, c] += w[kernel - 1 - back] * z[s, c]
    return out @ p["out"].T + p["out_bias"]


@pytest.mark.parametrize("method", [LightConv((3, 5)), LightConv((1, 4), heads=2)], ids=repr)
def test_each_channel_is_a_weighted_mean_of_the_last_tokens(method: LightConv) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=7)["input_ids"]
    with attach(model, method) as run, torch.no_grad():
        for number in (0, 1):
            p = trained(run, number)
            x, found = block_of(model, run, number, input_ids=ids)
            want = torch.stack([_by_loops(row, p) for row in x])
            assert p["kernel"].shape == (method.heads or 4, method.kernels[number])
            assert close(found, want)


def test_encoders_look_to_both_sides() -> None:
    model = models.tiny("bert").eval()
    ids = models.tiny_inputs(model, batch=1, length=7)["input_ids"]
    with attach(model, LightConv((3, 5))) as run, torch.no_grad():
        p = trained(run, 1)
        x, found = block_of(model, run, 1, input_ids=ids)
        assert close(found[0], _by_loops(x[0], p, causal=False))
        padded, mask = torch.cat([ids, ids[:, :4]], 1), torch.tensor([[1] * 7 + [0] * 4])
        whole = run(input_ids=padded, attention_mask=mask).logits
        assert close_model(whole[:, :7], run(input_ids=ids).logits)


def test_the_first_step_of_training() -> None:
    """Loss and every gradient against the authors' own reading: a grouped convolution with shared weights."""
    layer, method = Layer(0, 4, 4, 8, 8, 32), LightConv((3,))
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = [{k: v.double().requires_grad_() for k, v in method.parameters(layer).items()} for _ in range(2)]
    p = leaves[1]
    with torch.no_grad():
        for which in leaves:
            for name in ("in_bias", "out_bias"):
                which[name] += 0.1
    a, b = (x @ p["in"].T + p["in_bias"]).chunk(2, -1)
    weights = p["kernel"].softmax(-1).repeat_interleave(8, 0)[:, None]
    conv = nn.functional.conv1d(nn.functional.pad((a * b.sigmoid()).mT, (2, 0)), weights, groups=32).mT
    want = (conv @ p["out"].T + p["out_bias"]).pow(3).sum()
    found = embedded(method, x, leaves[0]).pow(3).sum()
    assert close(found, want)
    for mine, theirs in zip(*(torch.autograd.grad(loss, list(p.values())) for loss, p in
                              ((found, leaves[0]), (want, leaves[1]))), strict=True):  # fmt: skip
        assert bool(theirs.any())
        assert close(mine, theirs)


@pytest.mark.parametrize("method", BOTH, ids=repr)
def test_a_text_in_pieces_padded_and_reordered_is_the_text(method: Method) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=12)["input_ids"]
    with attach(model, method) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        for cuts in ((0, 1, 2, 3, 12), (0, 5, 11, 12)):
            cache, parts = None, []
            for start, stop in itertools.pairwise(cuts):
                out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
                cache = out[CACHE]
                parts.append(out.logits)
            assert close_model(torch.cat(parts, 1), whole)
        cache = run(input_ids=ids[:, :8], use_cache=True)[CACHE]
        cache.reorder_cache(torch.tensor([1, 0]))
        assert close_model(run(input_ids=ids.flip(0)[:, 8:], **{CACHE: cache}).logits, whole.flip(0)[:, 8:])


@pytest.mark.parametrize("far", [1, 6], ids=["near", "far"])
@pytest.mark.parametrize("method", BOTH, ids=repr)
def test_padding_on_either_side_counts_for_nothing(method: Method, far: int) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, batch=1, length=9)["input_ids"]
    other = models.tiny_inputs(model, batch=1, length=4, seed=3)["input_ids"]
    with attach(model, method) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        other = other.repeat(1, far)  # so many that a sort which is not asked for their order would not keep it
        gone = [0] * 4 * far
        for parts, marks in (([other, ids[:, :6]], [*gone, *[1] * 6]), ([ids[:, :6], other], [*[1] * 6, *gone])):
            mask = torch.tensor([marks])
            out = run(input_ids=torch.cat(parts, 1), attention_mask=mask, use_cache=True)
            assert close_model(out.logits[mask.bool()], whole[0, :6])
            for i in (6, 7, 8):  # what comes next goes on from the text, wherever the padding stood
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                place = torch.tensor([[i]])
                out = run(
                    input_ids=ids[:, i : i + 1], attention_mask=mask, position_ids=place, use_cache=True,
                    **{CACHE: out[CACHE]},
                )  # fmt: skip
                assert close_model(out.logits[:, 0], whole[:, i])


@pytest.mark.parametrize("method", BOTH, ids=repr)
def test_padding_in_the_middle_of_a_text_counts_for_nothing(method: Method) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, batch=1, length=9)["input_ids"]
    pad = torch.zeros(1, 2, dtype=torch.long)
    mask = torch.tensor([[1] * 6 + [0] * 2 + [1] * 3])
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = torch.cat([ids[:, :6], pad, ids[:, 6:]], 1)
    with attach(model, method) as run, torch.no_grad():
        whole, cache, parts = run(input_ids=ids).logits, None, []
        for start, stop in ((0, 4), (4, 8), (8, 11)):
            out = run(
                input_ids=padded[:, start:stop], attention_mask=mask[:, :stop], position_ids=place[:, start:stop],
                use_cache=True, **{CACHE: cache},
            )  # fmt: skip
            cache = out[CACHE]
            parts.append(out.logits)
    assert close_model(torch.cat(parts, 1)[mask.bool()], whole[0])


@pytest.mark.parametrize("method", BOTH[:2], ids=repr)
def test_tokens_that_were_never_read_are_missed(method: Method) -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=9)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True)[CACHE]
        with attach(model, method) as run:
            with pytest.raises(SiteError, match="goes on from token 6, and holds what came before no token"):
                run(input_ids=ids[:, 6:], **{CACHE: cache})
            cache = run(input_ids=ids[:, :6], use_cache=True)[CACHE]
            cache.crop(-2)
            with pytest.raises(SiteError, match="goes on from token 4, and holds what came before 6 token"):
                run(input_ids=ids[:, 4:], **{CACHE: cache})


def test_first_weights_have_the_authors_spread() -> None:
    p = LightConv((64,), heads=8).parameters(Layer(3, 4, 4, 64, 64, 256))
    bounds = {"in": math.sqrt(6 / (512 + 256)), "out": math.sqrt(6 / 512), "kernel": math.sqrt(6 / (64 + 8 * 64))}
    for name, bound in bounds.items():
        top = float(p[name].abs().max())
        assert 0.95 * bound < top <= bound
    assert not p["in_bias"].any()
    assert not p["out_bias"].any()


@pytest.mark.parametrize("kind", [LightConv, DynamicConv])
def test_wrong_fields_are_refused(kind: type[LightConv] | type[DynamicConv]) -> None:
    for kernels in ((), (3, 0)):
        with pytest.raises(FieldError, match=r"kernels = .*must (hold one|be 1) or more"):
            kind(kernels)
    for heads in (0, 5):
        with pytest.raises(FieldError, match=rf"heads = {heads}.*divide the 32 channels"):
            attach(models.tiny("llama"), kind(heads=heads))
