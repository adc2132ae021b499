"""`heedful.nn.Attention` beside `torch.nn.MultiheadAttention`: equal answers, gradients, masks; and its own errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heedful
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, RefusedModel, SiteError
from heedful.methods import DynamicConv, EfficientAttention, SigmoidAttention, SinkWindow, TempScale
from heedful.nn import Attention, convert

E, H, B, N, M = 32, 4, 2, 7, 9

CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)
SCATTERED = torch.rand(N, N, generator=torch.Generator().manual_seed(1)) > 0.6
SCATTERED.fill_diagonal_(False)
BY_HEAD = torch.rand(B * H, N, N, generator=torch.Generator().manual_seed(2)) > 0.5
BY_HEAD.diagonal(dim1=1, dim2=2).fill_(False)
LEFT = torch.arange(N)[None] < torch.tensor([[2], [0]])
RIGHT = torch.arange(N)[None] >= torch.tensor([[N], [N - 3]])
ADDED = torch.randn(N, N, generator=torch.Generator().manual_seed(3))

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": SCATTERED},
    "causal": {"attn_mask": CAUSAL},
    "causal, told": {"attn_mask": CAUSAL, "is_causal": True},
    "causal, as numbers": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(N)},
    "numbers": {"attn_mask": ADDED},
    "numbers, some of them endless": {"attn_mask": ADDED.masked_fill(SCATTERED, float("-inf"))},
    "numbers over causality": {"attn_mask": ADDED.masked_fill(CAUSAL, float("-inf"))},
    "by head": {"attn_mask": BY_HEAD},
    "numbers by head": {"attn_mask": torch.randn(B * H, N, N, generator=torch.Generator().manual_seed(4))},
    "padding": {"key_padding_mask": RIGHT},
    "padding on the left": {"key_padding_mask": LEFT},
    "padding as numbers": {"key_padding_mask": torch.zeros(B, N).masked_fill(RIGHT, float("-inf"))},
    "numbers for keys": {"key_padding_mask": torch.randn(B, N, generator=torch.Generator().manual_seed(5))},
    "padding and causality": {"key_padding_mask": RIGHT, "attn_mask": CAUSAL},
    "padding and numbers": {
        "key_padding_mask": torch.zeros(B, N).masked_fill(RIGHT, float("-inf")),
        "attn_mask": ADDED,
    },
}


def torchs(**how: Any) -> nn.MultiheadAttention:
    """torch's module, its biases too drawn at random."""
    module = nn.MultiheadAttention(E, H, **how)
    for name, p in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    return module


def gradients(module: nn.Module) -> list[Tensor]:
    """Of the projections' weights and biases, in one order for both kinds of module."""
    if isinstance(module, Attention):
        three = (module.q_proj, module.k_proj, module.v_proj)
        parts = [torch.cat([p.weight.grad for p in three]), torch.cat([p.bias.grad for p in three])]
    else:
        parts = [module.in_proj_weight.grad, module.in_proj_bias.grad]
    return [*parts, module.out_proj.weight.grad, module.out_proj.bias.grad]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("masks", MASKS.values(), ids=list(MASKS))
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_outputs_weights_and_gradients_are_torchs(masks: dict[str, Any], weights: bool, average: bool) -> None:
    theirs = torchs(batch_first=average)
    mine = Attention.from_torch(theirs)
    found = []
    x = torch.randn(B, N, E) if average else torch.randn(N, B, E)
    up = torch.randn_like(x)
    for module in (theirs, mine):
        given = x.clone().requires_grad_()
        out, pattern = module(given, given, given, need_weights=weights, average_attn_weights=average, **masks)
        out.backward(up)
        found.append((out, pattern, given.grad, *gradients(module)))
    assert (found[1][1] is None) is not weights
    for wanted, got in zip(*found, strict=True):
        assert (wanted is None and got is None) or close(got, wanted)


@pytest.mark.parametrize(
    "how", [{}, {"bias": False}, {"kdim": 24, "vdim": 40}, {"kdim": 24, "vdim": 40, "bias": False}]
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_is_torchs(how: dict[str, Any], batch_first: bool) -> None:
    theirs = torchs(batch_first=batch_first, **how).double()
    mine = Attention.from_torch(theirs)
    q, k, v = (torch.randn(B, n, e).double() for n, e in ((N, E), (M, theirs.kdim), (M, theirs.vdim)))
    padding = torch.arange(M)[None] >= torch.tensor([[M], [M - 4]])
    given = (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(N, M).double()}):
        for wanted, got in zip(theirs(*given, **masks), mine(*given, **masks), strict=True):
            assert close(got, wanted)
    single = (q[0], k[0], v[0])
    for wanted, got in zip(theirs(*single), mine(*single), strict=True):
        assert close(got, wanted)
    assert mine(*single, key_padding_mask=padding[1])[0].shape == (N, E)


def test_weights_come_along_where_nobody_speaks_of_them() -> None:
    x = torch.randn(B, N, E)
    assert Attention(E, H, batch_first=True)(x, x, x)[1].shape == (B, N, N)
    assert Attention(E, H, EfficientAttention(), batch_first=True)(x, x, x)[1] is None
    assert Attention(E, H, DynamicConv(), batch_first=True, causal=True)(x, x, x)[1] is None


def test_from_torch_takes_along_how_it_trains() -> None:
    theirs = torchs(dropout=0.5, batch_first=True).bfloat16().eval()
    theirs.in_proj_weight.requires_grad_(False)
    mine = Attention.from_torch(theirs)
    assert mine.dropout == 0.5
    assert not mine.training
    assert {p.dtype for p in mine.parameters()} == {torch.bfloat16}
    learning = {name for name, p in mine.named_parameters() if p.requires_grad}
    assert learning == {"q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.weight", "out_proj.bias"}
    x = torch.randn(B, N, E, dtype=torch.bfloat16)
    assert torch.equal(mine(x, x, x)[0], mine(x, x, x)[0])
    mine.train()
    assert not torch.equal(mine(x, x, x)[0], mine(x, x, x)[0])


def test_key_heads_are_shared_by_groups_and_causality_needs_no_mask() -> None:
    mine = Attention(E, H, kv_heads=2, causal=True, batch_first=True)
    x = torch.randn(B, N, E)
    q, k, v = (p(x).unflatten(-1, (-1, E // H)).transpose(1, 2) for p in (mine.q_proj, mine.k_proj, mine.v_proj))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wanted = mine.out_proj(heads.transpose(1, 2).flatten(2))
    assert close(mine(x, x, x)[0], wanted)
    assert close(mine(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0], wanted)


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL.repeat(B * H, 1, 1), MASKS["causal, as numbers"]["attn_mask"]])
def test_a_causal_mask_is_the_rule_that_mechanisms_without_a_map_keep(mask: Tensor) -> None:
    mine, x = Attention(E, H, EfficientAttention(), batch_first=True), torch.randn(B, N, E)
    out = mine(x, x, x, attn_mask=mask)[0]
    assert close(mine(x[:, :4], x[:, :4], x[:, :4], is_causal=True)[0], out[:, :4])
    with pytest.raises(SiteError, match="can honour causality and padding only"):
        mine(x, x, x, attn_mask=SCATTERED)


def test_sequences_of_another_length_stand_apart_and_the_same_one_does_not() -> None:
    def look(q: Tensor, call: Any) -> Tensor:
        seen.append((call.cross, len(call.queries), len(call.keys)))
        return q

    seen: list[tuple[bool, int, int]] = []
    mine = Attention(E, H, heedful.edit(heedful.Site.QUERY, look), batch_first=True)
    x, other = torch.randn(B, N, E), torch.randn(B, M, E)
    mine(x, x, x)
    mine(x, other, other)
    mine(x, x.clone(), x, is_causal=True)  # normed apart, say
    assert seen == [(False, N, N), (True, N, M), (False, N, N)]


def test_a_method_that_edits_the_input_edits_it_for_keys_and_values_too() -> None:
    halved = heedful.edit(heedful.Site.HIDDEN, lambda x, call: x * 0.5)
    mine, x = Attention(E, H, halved, batch_first=True), torch.randn(B, N, E)
    found = mine(x, x, x)[0]
    with mine.run.paused():
        assert close(mine(x / 2, x / 2, x / 2)[0], found)
        assert not close(mine(x, x, x)[0], found)


def model() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=True)


@pytest.mark.parametrize("training", [True, False])
def test_convert_exchanges_every_module_of_a_model(training: bool) -> None:
    plain = model().train(training)
    x = torch.randn(B, N, E)
    given = {"src_key_padding_mask": RIGHT}
    wanted = plain(x, **given)
    assert convert(plain) is plain
    inside = [m for m in plain.modules() if isinstance(m, Attention)]
    assert [(m.layer, m.depth) for m in inside] == [(0, 3), (1, 3), (2, 3)]
    with torch.set_grad_enabled(training):
        found = plain(x, **given)
    assert close(found[~RIGHT], wanted[~RIGHT], 1024)
    masked = plain(x, mask=CAUSAL, is_causal=True)
    assert close(masked[:, :4], plain(x[:, :4], mask=CAUSAL[:4, :4], is_causal=True), 1024)


def test_convert_reaches_decoders_and_keeps_what_is_shared() -> None:
    whole = nn.Transformer(E, H, 1, 2, 64, dropout=0.0, batch_first=True)
    whole.again = whole.decoder.layers[0].self_attn
    source, target = torch.randn(B, M, E), torch.randn(B, N, E)
    wanted = whole(source, target, tgt_mask=CAUSAL)
    convert(whole)
    assert close(whole(source, target, tgt_mask=CAUSAL), wanted, 1024)
    assert whole.again is whole.decoder.layers[0].self_attn
    under = convert(nn.Transformer(E, H, 1, 2, 64, batch_first=True), SinkWindow(1, 2).on(layers=[0]))
    assert [m.run.stack.steps(m.layer) != () for m in under.modules() if isinstance(m, Attention)] == [
        True, False, False, False, False,
    ]  # fmt: skip
    assert isinstance(convert(torchs()), Attention)


class Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (nn.MultiheadAttention(E, H, add_bias_kv=True), "add_bias_kv = True: appends a key that stands at no place"),
        (nn.MultiheadAttention(E, H, add_zero_attn=True), "add_zero_attn = True: appends a key"),
        (Own(E, H), "module = 'Own': has a forward of its own"),
    ],
)
def test_convert_leaves_a_model_as_it_was_where_it_cannot(last: nn.Module, message: str) -> None:
    whole = nn.ModuleList([torchs(), last])
    with pytest.raises(FieldError, match=message):
        convert(whole)
    assert not any(isinstance(m, Attention) for m in whole)


@pytest.mark.parametrize("how", [{}, {"key_padding_mask": torch.zeros(B, N, dtype=torch.bool)}])
def test_an_export_is_told_how_to_call_it(how: Any) -> None:
    mine, x = Attention(E, H, causal=True, batch_first=True).eval(), torch.randn(B, N, E)
    given = {**how, "need_weights": False} if how else {}
    with pytest.raises(RefusedModel, match=r"call it with need_weights=False, and say causal=True where a mask"):
        torch.export.export(mine, (x, x, x), given, strict=False)
    made = torch.export.export(mine, (x, x, x), {"need_weights": False}, strict=False).module()
    assert close(made(x, x, x, need_weights=False)[0], mine(x, x, x)[0])


X = torch.zeros(B, N, E)
OTHER = torch.zeros(B, M, E)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(30, 4), r"heads = 4: must be 1 or more and divide the width, 30"),
        (lambda: Attention(E, H, kv_heads=3), r"kv_heads = 3: must be 1 or more and divide the heads"),
        (lambda: Attention(E, H, kv_heads=0), r"kv_heads = 0: must be 1 or more"),
        (lambda: Attention(E, H, kdim=0), r"kdim = 0: must be 1 or more; None: the width; for example kdim=32"),
        (lambda: Attention(E, H, vdim=-3), r"vdim = -3: must be 1 or more"),
        (lambda: Attention(E, H, dropout=1.0), r"dropout = 1.0: must be from 0 up and below 1"),
        (lambda: Attention(E, H, layer=-1), r"layer = -1: must be 0 or more"),
        (lambda: Attention(E, H, layer=2, depth=2), r"depth = 2: must be above layer 2"),
        (lambda: Attention(E, H, SinkWindow().on(layers=[1])), r"layers = 1: must be below 1"),
        (lambda: Attention(E, H, heedful.edit(heedful.Site.RESIDUAL, lambda x, _: x)), r"attach\(model, method\) acts"),
        (lambda: convert(nn.Linear(2, 2)), r"model = 'Linear': has no torch.nn.MultiheadAttention"),
        (lambda: MINE(X[..., :5], X, X), r"query = \(2, 7, 5\): must be of \('b', 'n', 32\)"),
        (lambda: MINE(X, OTHER, X), r"value = .*must have the query's texts and the key's tokens"),
        (lambda: MINE(X, X, X, attn_mask=CAUSAL[:4]), r"attn_mask = \(4, 7\): must be of \(7, 7\) or \(8, 7, 7\)"),
        (lambda: MINE(X, X, X, attn_mask=CAUSAL.long()), r"attn_mask = 'torch.int64': must be bool, where True hides"),
        (lambda: MINE(X, X, X, attn_mask=SCATTERED, is_causal=True), r"is_causal = True: says that attn_mask is the"),
        (lambda: MINE(X, OTHER, OTHER, is_causal=True), r"which of 9 keys stand before which of 7 queries is not"),
        (lambda: MINE(X, X, X, key_padding_mask=LEFT[:, 1:]), r"key_padding_mask = \(2, 6\): has a row for each text"),
    ],
)
def test_errors_name_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        call()


MINE = Attention(E, H, batch_first=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [(EfficientAttention(), "computes no pattern"), (DynamicConv(), "need_weights=False")],
)
def test_weights_that_a_method_has_not_are_refused(method: heedful.Method, message: str) -> None:
    mine = Attention(E, H, method, causal=True, batch_first=True)
    with pytest.raises(SiteError, match=message):
        mine(X, X, X, need_weights=True)


def test_a_block_that_would_ignore_the_other_sequence_is_refused() -> None:
    with pytest.raises(SiteError, match="cross attention would ignore the other"):
        Attention(E, H, DynamicConv(), batch_first=True)(X, OTHER, OTHER)


def test_it_says_what_it_is() -> None:
    text = repr(Attention(E, H, SigmoidAttention(), kv_heads=2, causal=True))
    assert "32, 4, SigmoidAttention(length=2048), kv_heads=2, causal=True" in text


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ((16, TempScale()), r"Attention\.heads = .*must be int; for example heads=1$"),
        ((0, 4), "width = 0: must be 1 or more"),
        ((16.0, 4), r"width = 16\.0: must be int"),
        ((16, 4, "tempscale(0.5)"), r"Attention\.method = .* must be Method"),
    ],
)
def test_what_is_no_size_and_no_method_is_refused(given: Any, rule: str) -> None:
    with pytest.raises(FieldError, match=rule):
        Attention(*given)
