"""Models of plain torch: what their modules hand to torch's attention arrives as what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.probe import DropPattern, Look
from heedful import attach
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError, NotEntered, RefusedModel, SiteError
from heedful.core.mask import Causal, Dense, Padding
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads

from .samples import PAPER, Forget, Gate, Scale, Shares
from .test_residual import Push
from .torch_models import Attention, E, H, Listed, Plain, WrittenOut, tokens, written_out

CALLS: list[Call] = []


class Spy(Method):
    paper = PAPER

    @reads(Site.QUERY)
    def keep(self, q: Tensor, call: Call) -> None:
        CALLS.append(call)


class Halve(Method):
    paper = PAPER

    @at(Site.PATTERN)
    def halve(self, weights: Tensor, call: Call) -> Tensor:
        return weights * 0.5


class Twice(Method):
    paper = PAPER

    @at(Site.HIDDEN)
    def double(self, x: Tensor, call: Call) -> Tensor:
        return 2 * x


class TwiceOut(Method):
    paper = PAPER

    @at(Site.OUTPUT)
    def double(self, x: Tensor, call: Call) -> Tensor:
        return 2 * x


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HOW: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": draw(2, 1, 10, 10) > -0.5},
    "bool of queries and keys alone": {"attn_mask": (draw(10, 10) > -0.5) | torch.eye(10, dtype=torch.bool)},
    "float": {"attn_mask": draw(1, H, 10, 10)},
    "float with minus infinity": {"attn_mask": draw(10, 10).masked_fill(~torch.ones(10, 10).tril().bool(), -torch.inf)},
    "heads in the first of three axes": {"attn_mask": draw(H, 10, 10)},
    "keys alone": {"attn_mask": torch.arange(10).lt(torch.tensor([10, 6])[:, None])[:, None, None]},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
@torch.no_grad()
def test_whatever_torchs_function_is_told_is_honoured(how: dict[str, Any], backend: str) -> None:
    model, x = Plain(**how), tokens()
    native = model(x)
    with attach(model, Look(), backend=backend, inputs=x) as run:
        assert close_model(run(x), native)
    with attach(model, Halve(), backend=backend, inputs=x) as run:
        halved = run(x)
    with WrittenOut(lambda p: p / 2):
        assert close_model(halved, model(x))
    with attach(model, Look().when("decode")) as run:
        assert torch.equal(run(x), native)
    assert torch.equal(model(x), native)


@torch.no_grad()
def test_grouped_heads_and_values_of_another_width() -> None:
    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k = x.view(2, 10, H, 8).transpose(1, 2), x[..., :16].view(2, 10, 2, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, k[..., :6], enable_gqa=True)

    model = nn.Sequential(Grouped())
    with attach(model, Look(), inputs=tokens(), backend="reference") as run:
        assert close(run(tokens()), model_of(run)(tokens()))
        size = run._adapter.sizes()[0]
    assert (size.heads, size.kv_heads, size.head_dim, size.value_dim) == (H, 2, 8, 6)


def model_of(run: Any) -> Any:
    def native(*args: Any, **kwargs: Any) -> Any:
        with run.paused():
            return run.model(*args, **kwargs)

    return native


@torch.no_grad()
def test_masks_of_keys_alone_are_padding_and_tell_positions() -> None:
    text = torch.arange(10).ge(torch.tensor([0, 3])[:, None])
    model = Plain(attn_mask=text[:, None, None])
    CALLS.clear()
    with attach(model, Spy(), inputs=tokens()) as run:
        run(tokens())
    (rule,) = CALLS[0].mask.rules
    assert isinstance(rule, Padding)
    assert CALLS[0].is_text[:, 0].tolist() == text.tolist()
    assert CALLS[0].q_pos[1, 0].tolist() == list(range(-3, 7))
    with attach(Plain(**HOW["bool"]), Spy(), inputs=tokens()) as run:
        run(tokens())
    assert isinstance(CALLS[-1].mask.rules[0], Dense)
    with attach(Plain(is_causal=True), Spy(), inputs=tokens()) as run:
        run(tokens())
    assert isinstance(CALLS[-1].mask.rules[0], Causal)


@torch.no_grad()
def test_cross_attention_is_known_whatever_the_lengths() -> None:
    model = Plain(cross=True)
    for n in (10, 7, 13):
        CALLS.clear()
        with attach(model, Spy(), inputs=(tokens(), tokens(n, 1))) as run:
            assert close_model(run(tokens(), tokens(n, 1)), model_of(run)(tokens(), tokens(n, 1)))
        assert [call.cross for call in CALLS] == [False, True] * 2
        assert [len(call.keys) for call in CALLS] == [10, n] * 2
        assert run.layer_names[1] == "blocks.0.cross"


@torch.no_grad()
def test_steps_with_a_cache_of_the_models_own_stand_where_they_are() -> None:
    class Cached(Attention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            past = tokens(6, 3)
            q, k, v = self.qkv(torch.cat([past, x], 1)).view(2, -1, 3, H, 8).permute(2, 0, 3, 1, 4)
            return self.proj(self.kernel(q[:, :, 6:], k, v).transpose(1, 2).reshape(2, -1, E))

    CALLS.clear()
    model = nn.Sequential(Cached(), Cached())
    with attach(model, Spy()) as run:
        run(tokens(1))
        run(tokens(3))
    assert [call.q_pos.flatten().tolist() for call in CALLS[::2]] == [[6], [6, 7, 8]]
    assert [call.phase.value for call in CALLS[::2]] == ["decode", "prefill"]
    assert not any(call.cross for call in CALLS)


@torch.no_grad()
def test_the_sites_around_the_call() -> None:
    model, x = Plain(), tokens()
    with attach(model, Twice(), inputs=x) as run:
        doubled = run(x)
    norms = [block.norm for block in model.blocks]
    for norm in norms:
        norm.weight.mul_(2), norm.bias.mul_(2)
    assert close_model(doubled, model(x))
    for norm in norms:
        norm.weight.div_(2), norm.bias.div_(2)
    with attach(model, TwiceOut(), inputs=x) as run:
        doubled = run(x)
    for block in model.blocks:
        block.attn.proj.weight.mul_(2), block.attn.proj.bias.mul_(2)
    assert close_model(doubled, model(x))
    with attach(model, Push().on(layers=1), inputs=x) as run:
        assert not torch.equal(run(x), model_of(run)(x))


def encoder(**how: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True, **how)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not how).eval()


PAD = torch.arange(10).ge(torch.tensor([10, 7])[:, None])


def slow(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model without torch's fast path."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("how", [{}, {"src_key_padding_mask": PAD}], ids=["whole", "padded"])
@torch.no_grad()
def test_the_fast_path_of_torchs_encoders_skips_nobody(how: dict[str, Tensor]) -> None:
    model, x = encoder(), tokens()
    native, wanted = model(x, **how), slow(model, x, **how)
    with attach(model, Look()) as run:
        assert close_model(run(x, **how), wanted)
        assert run.activity().entered == (0, 1)
        assert run.layer_names == ("layers.0.self_attn", "layers.1.self_attn")
    with attach(model, DropPattern(), inputs=lambda: model(x, **how)) as run:
        assert not close_model(run(x, **how), wanted)
    with attach(model, Look().when("decode")) as run:
        assert torch.equal(run(x, **how), wanted)
    assert torch.equal(model(x, **how), native)
    assert model.use_nested_tensor


@torch.no_grad()
def test_torchs_decoder_has_both_its_attentions() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 48, dropout=0.0), 2).eval()
    x, memory = tokens().transpose(0, 1), tokens(10, 1).transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(10)
    how = {"tgt_mask": causal, "tgt_is_causal": True}
    CALLS.clear()
    with attach(model, Spy() | Look(), backend="reference") as run:
        assert close_model(run(x, memory, **how), slow(model_of(run), x, memory, **how))
    assert [call.cross for call in CALLS] == [False, True, False, True]
    assert isinstance(CALLS[0].mask.rules[0], Causal)
    assert CALLS[0].hidden is not None
    assert torch.equal(CALLS[0].hidden, tokens())
    with attach(model, TwiceOut().on(layers=[0, 2])) as run:
        doubled = run(x, memory, **how)
    for layer in model.layers:
        layer.self_attn.out_proj.weight.mul_(2), layer.self_attn.out_proj.bias.mul_(2)
    assert close_model(doubled, slow(model, x, memory, **how))


MHA: dict[str, dict[str, Any]] = {
    "plain": {},
    "appended keys": {"add_bias_kv": True, "add_zero_attn": True},
    "separate widths": {"kdim": 16, "vdim": 24},
}


@pytest.mark.parametrize("more", MHA.values(), ids=MHA)
@pytest.mark.parametrize("average", [True, False])
@torch.no_grad()
def test_weights_that_are_asked_for_are_those_of_the_run(more: dict[str, Any], average: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, H, batch_first=True, **more).eval()
    x, y = tokens(), tokens(7, 1)
    given = (x, y[..., : more.get("kdim", E)], y[..., : more.get("vdim", E)])
    if not more:
        given = (x, x, x)
    how = {"average_attn_weights": average}
    native, weights = slow(model, *given, **how)
    with attach(model, Look(), inputs=given, backend="reference") as run:
        found, seen = run(*given, **how)
        assert run(*given, need_weights=False)[1] is None
    assert close(found, native)
    assert close(seen, weights)
    with attach(model, Halve(), inputs=given) as run:
        assert close(run(*given, **how)[1], weights / 2)
    with attach(model, Look().when("decode"), inputs=given) as run:
        same, seen = run(*given, **how)
    assert torch.equal(same, native)
    assert torch.equal(seen, weights)


@torch.no_grad()
def test_unbatched_multi_head_attention_by_keyword() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(E, H).eval(), tokens()[0]
    how = {"query": x, "key": x, "value": x}
    native, weights = slow(model, **how)
    with attach(model, Twice(), inputs=how) as run:
        doubled = run(**how, need_weights=False)[0]
    heads = written_out(*(x.unflatten(-1, (H, 8)).transpose(0, 1) for x in project(model, 2 * x)))
    assert close_model(doubled, model.out_proj(heads.transpose(0, 1).flatten(1)))
    with attach(model, Look(), inputs=how, backend="reference") as run:
        found, seen = run(**how)
    assert close(found, native)
    assert close(seen, weights)
    with pytest.raises(FieldError, match="inputs"):
        attach(model, Look())(**how)


def project(model: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, model.in_proj_weight, model.in_proj_bias).chunk(3, -1)


@torch.no_grad()
def test_hidden_reaches_queries_keys_and_values_of_self_attention() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(E, H, batch_first=True).eval(), tokens()
    with attach(model, Twice(), inputs=(x, x, x)) as run:
        found = run(x, x, x, need_weights=False)[0]
    twice = 2 * x
    assert close_model(found, slow(model, twice, twice, twice, need_weights=False)[0])


def test_dropout_is_torchs_own_number() -> None:
    model, x = Plain(dropout_p=0.5), tokens()
    with attach(model, Look(), inputs=x, backend="reference") as run:
        a, b = run(x), run(x)
    assert not torch.equal(a, b)
    torch.manual_seed(0)
    with attach(Plain(dropout_p=1.0), Look(), inputs=x, backend="reference") as run:
        nothing = run(x)
    with attach(Plain(), DropPattern(), inputs=x) as run:
        assert close_model(nothing, run(x))


@torch.no_grad()
def test_what_a_run_says_of_layers_that_it_does_not_know_yet() -> None:
    model, x = Plain(), tokens()
    run = attach(model, Shares().on(layers=1))
    with pytest.raises(FieldError, match="known once it has run"):
        _ = run.layer_names
    with pytest.raises(NotEntered, match="was called by itself"):
        model.blocks[0](x)
    run(x)
    assert run.layer_names == ("blocks.0.attn", "blocks.1.attn")
    assert list(run.state.calls) == [1]
    run.close()
    with pytest.raises(FieldError, match="must be below 2"), attach(model, Shares().on(layers=5)) as run:
        run(x)
    with pytest.raises(FieldError, match="inputs"):
        attach(model, Gate())
    with attach(model, Gate(), inputs=x) as run:
        assert len(run.parameters()) == 2
        assert not torch.equal(run(x), model_of(run)(x))
    assert not [name for name, _ in model.named_parameters() if "gate" in name]
    with pytest.raises(RefusedModel, match="keeps no cache"):
        attach(model, Forget())


def test_only_a_part_of_a_model() -> None:
    model, x = Plain(cross=True), tokens()
    with attach(model, Look(), only="blocks.1", inputs=(x, x)) as run:
        run(x, x)
    assert run.layer_names == ("blocks.1.attn", "blocks.1.cross")
    with pytest.raises(FieldError, match="no served layer of Plain lies there"):
        attach(model, Look(), only="layers", inputs=(x, x))


def test_weights_and_a_block_that_is_replaced_do_not_go_together() -> None:
    class Nothing(Method):
        paper = PAPER

        @at(Site.BLOCK)
        def nothing(self, x: Tensor, call: Call) -> Tensor:
            return torch.zeros_like(x)

    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(E, H, batch_first=True), tokens()
    with attach(model, Nothing(), inputs=(x, x, x)) as run:
        assert not run(x, x, x, need_weights=False)[0].any()
        with pytest.raises(SiteError, match="need_weights=False"):
            run(x, x, x)


def test_scale_of_heads_is_scale_of_what_is_projected() -> None:
    model, x = Plain(), tokens()
    with attach(model, Scale(), inputs=x) as run:
        found = run(x)
    with WrittenOut(lambda p: 2 * p):
        assert close_model(found, model(x))


@torch.no_grad()
def test_a_projection_inside_a_sequence_that_names_its_parts() -> None:
    from collections import OrderedDict

    model, x = Plain(), tokens()
    for block in model.blocks:
        block.attn.proj = nn.Sequential(OrderedDict(c=block.attn.proj, bn=nn.LayerNorm(E)))
    with attach(model, TwiceOut(), inputs=x) as run:
        doubled = run(x)
    for block in model.blocks:
        block.attn.proj.c.weight.mul_(2), block.attn.proj.c.bias.mul_(2)
    assert close_model(doubled, model(x))


@torch.no_grad()
@pytest.mark.parametrize("in_list", [True, False])
def test_a_projection_as_diffusers_has_it(in_list: bool) -> None:
    model, x = Plain(), tokens()
    for block in model.blocks:
        block.attn = Listed(in_list)
    with attach(model, TwiceOut(), inputs=x) as run:
        doubled = run(x)
    for block in model.blocks:
        block.attn.projection.weight.mul_(2), block.attn.projection.bias.mul_(2)
    assert close_model(doubled, model(x))
