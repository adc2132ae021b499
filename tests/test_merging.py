"""Tokens merged and dropped between layers, against models that are given fewer tokens by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Dinov2Backbone, Dinov2Config

from benchmarks.beside_torch import library
from benchmarks.coverage.library_cases import PICTURES, SMALL, vit
from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call, Merged
from heedful.core.errors import ClashError, DefinitionError, InactiveWarning, RefusedModel, SiteError
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.regions import PerText, Region
from heedful.core.sites import Site, at
from heedful.kit.merging import averaged

from .samples import PAPER, Narrow, Shares
from .test_residual import Push
from .torch_models import Plain, tokens

To = tuple[tuple[int, ...], ...]
SIXTEEN = (0, 1, 1, 2, 3, 3, 3, 4, -1, 5, 6, 7, 7, 8, 8, 8, 1)  # of the 17 tokens of a small image


class Sends(Method):
    """Sends tokens behind a layer where it is told, row by row; a row for all where there is one."""

    paper = PAPER
    subjects = ("image",)
    causal = False
    chunk_invariant = False
    to: To
    layer: int = 0

    @at(Site.RESIDUAL, merges=True)
    def send(self, stream: Tensor, call: Call) -> Tensor | Merged:
        if call.layer != self.layer:
            return stream
        to = torch.tensor(self.to).expand(len(stream), -1)
        return Merged(averaged(stream, to, torch.ones_like(stream[..., 0])), to)


class SendsTwice(Sends):
    """Sends the tokens that are left behind the next layer too: the second into the first."""

    @at(Site.RESIDUAL, merges=True)
    def send(self, stream: Tensor, call: Call) -> Tensor | Merged:
        if call.layer != self.layer + 1:
            return Sends.send(self, stream, call)
        to = torch.arange(stream.shape[1]).expand(len(stream), -1) - 1
        return Merged(averaged(stream, to.clamp(min=0), torch.ones_like(stream[..., 0])), to.clamp(min=0))


class Spy(Method):
    """Writes down what the layers are told, in `call.state.run`."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> Tensor:
        call.state.run["told"] = call
        return heads * 2


def told(run: Any, layer: int) -> Call:
    found: Call = run.state._of_run[1, layer]["told"]
    return found


def by_hand(stream: Tensor, to: tuple[int, ...]) -> Tensor:
    """The means of the tokens `[n e]` that go together."""
    rows = [[stream[i] for i, there in enumerate(to) if there == j] for j in range(max(to) + 1)]
    return torch.stack([sum(row[1:], row[0]) / len(row) for row in rows])


def back(stream: Tensor, before: Tensor, to: tuple[int, ...]) -> Tensor:
    return torch.stack([before[i] if j < 0 else stream[j] for i, j in enumerate(to)])


def blocks(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


def image_model(attention: str = "eager") -> tuple[Any, dict[str, Tensor]]:
    model = models.tiny("vit", num_hidden_layers=4, image_size=16, attn_implementation=attention)
    return model, models.tiny_inputs(model, batch=3)


def finished(model: Any, x: Tensor) -> Tensor:
    """The last hidden states of a vision transformer, from the stream behind its last layer."""
    out: Tensor = model.vit.layernorm(x)
    return out


@torch.no_grad()
def under(model: Any, what: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    with attach(model, what, **how) as run:
        out: Tensor = run(**inputs, output_hidden_states=True).hidden_states[-1]
    return out


def alike(found: Tensor, want: Tensor) -> None:
    assert found.shape == want.shape
    assert close_model(found, want)


@torch.no_grad()
def expected(model: Any, inputs: dict[str, Tensor], to: To, layer: int) -> tuple[Tensor, Tensor]:
    """The stream behind the last layer, and the logits, one image after another."""
    out = []
    for row, pixels in enumerate(inputs["pixel_values"]):
        mine = to[row % len(to)]
        before = blocks(model.vit.layers[: layer + 1], model.vit.embeddings(pixels[None]))[0]
        left = blocks(model.vit.layers[layer + 1 :], by_hand(before, mine)[None])[0]
        out.append(back(left, before, mine))
    stream = torch.stack(out)
    return stream, model.classifier(model.vit.layernorm(stream)[:, 0])


RAGGED = (SIXTEEN, (0, *[-1] * 8, 1, 2, *[-1] * 5, 3), tuple(range(17)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
@pytest.mark.parametrize(("to", "layer"), [((SIXTEEN,), 0), ((SIXTEEN,), 2), ((SIXTEEN,), 3), (RAGGED, 1)])
def test_later_layers_have_the_tokens_that_are_left(attention: str, backend: str, to: To, layer: int) -> None:
    model, inputs = image_model(attention)
    stream, logits = expected(model, inputs, to, layer)
    with torch.no_grad(), attach(model, Sends(to, layer), backend=backend) as run:
        out = run(**inputs, output_hidden_states=True)
        assert run.active
    assert [x.shape[1] for x in out.hidden_states] == [17] * (layer + 1) + [len(set(max(to, key=max)) - {-1})] * (
        3 - layer
    ) + [17]
    alike(out.hidden_states[-1], stream)
    alike(out.logits, logits)


def test_where_nothing_is_merged_every_bit_is_as_it_was() -> None:
    model, inputs = image_model()
    with torch.no_grad():
        plain = model(**inputs).logits
        with pytest.warns(InactiveWarning), attach(model, Sends((tuple(range(17)),), 9)) as run:
            assert torch.equal(run(**inputs).logits, plain)
        with attach(model, Sends((tuple(range(17)),), 1)) as run:
            alike(run(**inputs).logits, plain)


@torch.no_grad()
def test_tokens_are_merged_more_than_once() -> None:
    model, inputs = image_model()
    with attach(model, SendsTwice((SIXTEEN,), 0)) as run:
        found = run(**inputs).logits
    for row, pixels in enumerate(inputs["pixel_values"]):
        first = by_hand(blocks(model.vit.layers[:1], model.vit.embeddings(pixels[None]))[0], SIXTEEN)
        second = by_hand(blocks(model.vit.layers[1:2], first[None])[0], (0, 0, *range(1, 8)))
        left = blocks(model.vit.layers[2:], second[None])
        alike(found[row], model.classifier(model.vit.layernorm(left)[0, 0]))


@torch.no_grad()
def test_all_tokens_part_again_however_often_they_were_merged() -> None:
    seen: list[Tensor] = []
    model, inputs = image_model()
    hook = model.vit.layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with attach(model, SendsTwice((SIXTEEN,), 0)) as run:
        run(**inputs)
    hook.remove()
    stream, before = seen[0][0], blocks(model.vit.layers[:1], model.vit.embeddings(inputs["pixel_values"]))[0]
    assert torch.equal(stream[0], stream[1])  # the second went into the first
    assert torch.equal(stream[5], stream[6])
    assert not torch.equal(stream[3], stream[4])
    assert close_model(stream[8], before[8])  # which was dropped


def test_layers_are_told_where_the_first_of_each_stood() -> None:
    model, inputs = image_model()
    roles = {"patches": Region(((1, 17),), (4, 4)), "half": ((1, 9),)}
    with torch.no_grad(), attach(model, Sends((SIXTEEN,), 1) | Spy(), roles=roles) as run:
        run(**inputs)
        early, late = told(run, 1), told(run, 2)
    assert early.q_pos.flatten().tolist() == list(range(17))
    assert early.region("patches").grid == (4, 4)
    firsts = [0, 1, 3, 4, 7, 9, 10, 11, 13]
    assert late.q_pos[0].flatten().tolist() == late.k_pos[2].flatten().tolist() == firsts
    assert late.queries.index[1].flatten().tolist() == firsts
    assert late.region("patches").grid is None
    assert late.numbers("half")[0, 0].tolist() == [-1, 0, 2, 3, 6, -1, -1, -1, -1]
    assert late.hidden is not None
    assert late.hidden.shape[1] == 9


def test_the_roles_of_an_image_and_of_each_text_lose_their_grid() -> None:
    model, inputs = image_model()
    each = [{"mine": Region(((1, 5),), (2, 2))}] * 3
    with torch.no_grad(), attach(model, Sends((SIXTEEN,), 0) | Spy(), roles=each) as run:
        run(**inputs)
        late = told(run, 3)
    assert late.region("patches") == Region(((1, 17),))
    assert late.region("patches").grid is None
    assert late.marked("cls")[0, 0].tolist() == [True, *[False] * 8]
    assert isinstance(late.roles["mine"], PerText)
    assert late.region("mine").grid is None


def test_places_that_are_empty_in_a_row_are_no_keys_and_no_text() -> None:
    model, inputs = image_model()
    with torch.no_grad(), attach(model, Sends(RAGGED, 0) | Spy()) as run:
        run(**inputs)
        late = told(run, 1)
    assert late.is_text.sum(-1).flatten().tolist() == [9, 4, 17]
    assert late.k_pos[1].flatten().tolist()[:4] == [0, 9, 10, 16]


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_other_edits_go_by_positions(first: bool) -> None:
    """A mask that lets tokens see those less than five places away."""

    class Near(Method):
        paper = PAPER
        causal = False

        @at(Site.MASK)
        def narrow(self, mask: Mask, call: Call) -> Mask:
            return mask & Where(lambda q, k: (q - k).abs() < 5)

    model, inputs = image_model()
    stack = Near() | Sends((SIXTEEN,), 1) if first else Sends((SIXTEEN,), 1) | Near()
    with attach(model, stack) as run:
        found = run(**inputs).logits
    firsts = torch.tensor([0, 1, 3, 4, 7, 9, 10, 11, 13])

    def near(places: Tensor) -> Tensor:
        return ((places[:, None] - places).abs() < 5)[None, None]

    x = model.vit.embeddings(inputs["pixel_values"])
    plain = models.tiny("vit", num_hidden_layers=4, image_size=16, attn_implementation="sdpa")
    for layer in plain.vit.layers[:2]:
        x = layer(x, near(torch.arange(17)))
    x = torch.stack([by_hand(row, SIXTEEN) for row in x])
    for layer in plain.vit.layers[2:]:
        x = layer(x, near(firsts))
    alike(found, model.classifier(model.vit.layernorm(x)[:, 0]))


def test_a_later_edit_of_the_same_layer_has_the_tokens_that_are_left() -> None:
    model, inputs = image_model()
    with torch.no_grad():
        after = under(model, Sends((SIXTEEN,), 1) | Push(0.5).on(layers=1), inputs)
        before = under(model, Push(0.5).on(layers=1) | Sends((SIXTEEN,), 1), inputs)
    assert after.shape == before.shape
    kept = [i for i in range(17) if i != 8]
    assert close_model(after[:, kept], before[:, kept])  # the mean of pushed tokens is the pushed mean
    assert not close_model(after[:, 8], before[:, 8])  # this one was dropped before it was pushed


@torch.no_grad()
def test_padded_texts() -> None:
    """An encoder of texts, whose padding is never merged with what is text."""
    model = models.tiny("bert", num_hidden_layers=3)
    ids = models.tiny_inputs(model, length=8)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    to = ((0, 1, 1, 2, 3, 3, 4, 5), (0, 0, 1, 2, 3, 3, 4, 5))
    with attach(model, Sends(to, 0)) as run:
        both = run(input_ids=ids, attention_mask=mask).logits
    with attach(model, Sends(((0, 1, 1, 2, 3, 3),), 0)) as run:
        alike(both[:1, :6], run(input_ids=ids[:1, :6]).logits)
    with attach(model, Sends(to[1:], 0)) as run:
        alike(both[1:], run(input_ids=ids[1:]).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_texts_without_padding_are_told_so_by_a_mask(attention: str) -> None:
    model = models.tiny("bert", num_hidden_layers=3, attn_implementation=attention)
    ids = models.tiny_inputs(model, length=8)["input_ids"]
    pair = Sends(((0, 1, 1, 2, 3, 3, 4, 5),), 0)
    with attach(model, pair, backend="reference") as run:
        want = run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    with attach(model, pair) as run:
        alike(run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, want)


@torch.no_grad()
def test_rows_that_are_padded_and_then_left_with_unlike_numbers() -> None:
    model = models.tiny("bert", num_hidden_layers=3)
    ids = models.tiny_inputs(model, length=8)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    to = ((0, 1, 1, 2, 3, 3, 4, 5), (0, 0, 0, 0, 1, 1, 2, 3))
    with attach(model, Sends(to, 0)) as run:
        both = run(input_ids=ids, attention_mask=mask).logits
    with attach(model, Sends(to[1:], 0)) as run:
        alike(both[1:], run(input_ids=ids[1:]).logits)


@torch.no_grad()
def test_a_decoder_sees_as_many_as_ever() -> None:
    model = models.tiny("bart")
    inputs = models.tiny_inputs(model)
    every = tuple(range(12))
    with attach(model, Sends(((*range(11), 10),), 0), only="model.encoder") as run:
        merged = run(**inputs)
    with attach(model, Sends((every,), 0), only="model.encoder") as run:
        alike(run(**inputs).logits, model(**inputs).logits)
    assert merged.encoder_last_hidden_state.shape[1] == 12
    assert torch.equal(merged.encoder_last_hidden_state[:, 10], merged.encoder_last_hidden_state[:, 11])
    assert not close_model(merged.logits, model(**inputs).logits)


@torch.no_grad()
def test_timm() -> None:
    model = vit(depth=3)
    to = (0, 1, 1, 2, -1, *range(3, 31))
    with attach(model, Sends((to,), 0), inputs=PICTURES) as run:
        found = run(PICTURES)
        assert run.active
    x = model.pos_drop(model._pos_embed(model.patch_embed(PICTURES)))
    x = model.blocks[0](x)
    left = blocks(model.blocks[1:], torch.stack([by_hand(row, to) for row in x]))
    alike(found, model.head(model.fc_norm(model.norm(left))[:, 0]))


@torch.no_grad()
def test_a_mean_over_tokens_counts_each_of_those_that_went_together() -> None:
    model = vit(depth=3, global_pool="avg", class_token=False)
    to = (0, 0, 0, 1, *range(2, 30))
    with attach(model, Sends((to,), 1), inputs=PICTURES) as run:
        found = run(PICTURES)
    x = blocks(model.blocks[:2], model.norm_pre(model._pos_embed(model.patch_embed(PICTURES))))
    left = model.norm(blocks(model.blocks[2:], torch.stack([by_hand(row, to) for row in x])))
    mean = (3 * left[:, 0] + left[:, 1:].sum(1)) / 32
    alike(found, model.head(model.fc_norm(mean)))


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_torch_s_own_encoder(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x, to = tokens(6), (0, 1, 1, -1, 2, 0)
    given = x if batch_first else x.transpose(0, 1)
    with attach(model, Sends((to,), 0), inputs=given) as run:
        found = run(given)
    assert found.shape == given.shape
    before = model.layers[0](given)
    before = before if batch_first else before.transpose(0, 1)
    left = torch.stack([by_hand(row, to) for row in before])
    left = blocks(model.layers[1:], left if batch_first else left.transpose(0, 1))
    left = left if batch_first else left.transpose(0, 1)
    want = torch.stack([back(row, old, to) for row, old in zip(left, before, strict=True)])
    alike(found if batch_first else found.transpose(0, 1), want)


@torch.no_grad()
def test_ragged_rows_in_a_model_of_torch() -> None:
    model, x, to = Plain(), tokens(6), ((0, 1, 1, -1, 2, 0), (0, 1, 2, 3, 4, 5))
    with attach(model, Sends(to, 0), inputs=x) as run:
        found = run(x)
    before = model.blocks[0](x)
    for row, mine in enumerate(to):
        left = blocks(model.blocks[1:], by_hand(before[row], mine)[None])[0]
        alike(found[row], back(left, before[row], mine))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("to", [(SIXTEEN,), RAGGED])
def test_gradient_checkpointing(reentrant: bool, to: To) -> None:
    def gradients(again: bool) -> list[Tensor]:
        model, inputs = image_model()
        model.train()
        if again:
            model.vit.embeddings.requires_grad_(True)
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
        with attach(model, Sends(to, 1)) as run:
            run(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for found, want in zip(gradients(True), gradients(False), strict=True):
        alike(found, want)


def test_gradients_reach_what_was_merged_and_then_dropped() -> None:
    class Drops(SendsTwice):
        @at(Site.RESIDUAL, merges=True)
        def send(self, stream: Tensor, call: Call) -> Tensor | Merged:
            if call.layer != 1:
                return Sends.send(self, stream, call)
            return Merged(stream[:, :2], torch.tensor([[0, 1, -1]]).expand(len(stream), -1))

    model, x = Plain(), tokens(4).requires_grad_()
    model.blocks.append(Plain().blocks[0])
    with attach(model, Drops(((0, 1, 2, 2),)), inputs=x.detach()) as run:
        out = run(x)
        (grad,) = torch.autograd.grad(out[:, 3].sum(), x)
    first = model.blocks[0](x)
    left = torch.stack([by_hand(row, (0, 1, 2, 2)) for row in first])
    want = torch.autograd.grad(model.blocks[1](left)[:, 2].sum(), x)[0]
    alike(grad, want)


def test_gradients_reach_the_tokens_that_were_dropped() -> None:
    model, x = Plain(), tokens(4).requires_grad_()
    with attach(model, Sends(((0, -1, 1, 1),), 0), inputs=x.detach()) as run:
        (grad,) = torch.autograd.grad(run(x)[:, 1].sum(), x)
    assert bool(grad[:, 1].any())
    want = torch.autograd.grad(model.blocks[0](x)[:, 1].sum(), x)[0]
    alike(grad, want)


# what is refused


def refuses(model: Any, what: Any, inputs: dict[str, Tensor], match: str, error: Any = SiteError, **how: Any) -> None:
    with torch.no_grad(), pytest.raises(error, match=match), attach(model, what, **how) as run:
        run(**inputs)


def test_models_in_which_a_token_is_more_than_itself() -> None:
    llama = models.tiny("llama")
    inputs = models.tiny_inputs(llama, length=4)
    pair = Sends(((0, 0, 1, 2),), 0)
    refuses(llama, pair, inputs, "reads into a cache", RefusedModel)
    refuses(llama, pair, {**inputs, "use_cache": False}, "the model is causal")
    bart = models.tiny("bart")
    decoder = ("model.decoder",)
    refuses(bart, pair, models.tiny_inputs(bart, length=4), "reads into a cache", RefusedModel, only=decoder)


def test_layers_that_are_handed_things_of_all_tokens() -> None:
    model, inputs = image_model()
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    own = model.vit.layers[2].forward
    model.vit.layers[2].forward = lambda x, *_, **more: own(x, mask)
    refuses(model, Sends((SIXTEEN,), 0), inputs, "'attention_mask' .* of 17 tokens, and 9 are left", RefusedModel)


def test_angles_of_the_patches_alone() -> None:
    model = models.tiny("vit", num_hidden_layers=4, image_size=16)
    inputs = models.tiny_inputs(model, batch=3)
    for layer in model.vit.layers:
        own = layer.attention.forward
        layer.attention.forward = lambda x, mask=None, position_embeddings=None, own=own, **more: own(x, mask, **more)
        layer.forward = partial(type(layer).forward, layer, position_embeddings=(torch.ones(16, 8),) * 2)
    refuses(model, Sends((SIXTEEN,), 0), inputs, "'position_embeddings' for each token", RefusedModel)


def test_backbones_that_make_maps_of_inner_streams() -> None:
    how: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=56)
    pixels, to = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)), (SIXTEEN,)
    inner = Dinov2Backbone(Dinov2Config(**how, out_features=["stage2", "stage4"])).eval()
    with pytest.raises(RefusedModel, match=r"maps of the streams behind its layers \[2, 4\]"):
        attach(inner, Sends(to, 1))
    last = Dinov2Backbone(Dinov2Config(**how, out_features=["stage4"])).eval()
    with torch.no_grad(), attach(last, Sends(to, 1)) as run:
        assert run(pixel_values=pixels).feature_maps[0].shape == (2, 32, 4, 4)
    timm = library("timm").create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **SMALL)
    with pytest.raises(RefusedModel, match=r"maps of the streams behind its layers \[0, 1\]"):
        attach(timm.eval(), Sends(to, 0), inputs=PICTURES)


def test_a_list_that_ends_with_a_layer_of_before() -> None:
    model, x = Plain(), tokens(4)
    model.blocks.append(model.blocks[1])
    with pytest.raises(RefusedModel, match="blocks ends with a layer that it runs before too"):
        attach(model, Sends(((0, 0, 1, 2),), 0), inputs=x)


def test_a_bias_that_a_layer_makes_for_pairs_of_tokens() -> None:
    x, bias = tokens(4), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    match = r"blocks\.1\.attn .* a bias of its own for pairs of tokens, of which 3 are left"
    model = Plain(attn_mask=bias)
    with (
        torch.no_grad(),
        pytest.raises(RefusedModel, match=match),
        attach(model, Sends(((0, 0, 1, 2),), 0), inputs=x) as run,
    ):
        run(x)
    with torch.no_grad(), attach(model, replace(Sends(((0, 0, 1, 2),), 0), layer=1), inputs=x) as run:
        assert run(x).shape == x.shape  # behind the last layer nobody is told of it


def test_a_bias_in_the_arguments_of_transformers_attention() -> None:
    model, inputs = image_model()
    bias = torch.randn(1, 4, 17, 17, generator=torch.Generator().manual_seed(0))
    for layer in model.vit.layers:
        part, own = layer.attention, layer.attention.forward
        part.forward = lambda x, mask=None, own=own, **more: own(x, bias, **more)
    refuses(model, Sends((SIXTEEN,), 0), inputs, "a bias of its own for pairs of tokens", RefusedModel)


def test_a_mask_of_the_model_s_own() -> None:
    model, x = Plain(), tokens(4)
    with torch.no_grad(), attach(model, Narrow(2) | Sends(((0, 0, 1, 2),), 0), inputs=x) as run:
        assert run(x).shape == x.shape  # an edit's mask is made anew in each layer
    causal = Plain(is_causal=True)
    with (
        torch.no_grad(),
        pytest.raises(SiteError, match="the model is causal"),
        attach(causal, Sends(((0, 0, 1, 2),), 0), inputs=x) as run,
    ):
        run(x)
    table = Plain(attn_mask=torch.tensor([[True, False, True, True]] * 4))
    with (
        torch.no_grad(),
        pytest.raises(SiteError, match="tokens by number"),
        attach(table, Sends(((0, 0, 1, 2),), 0), inputs=x) as run,
    ):
        run(x)


def test_a_list_that_is_served_in_part() -> None:
    model, inputs = image_model()
    names = ("vit.layers.0", "vit.layers.1")
    refuses(model, Sends((SIXTEEN,), 1), inputs, r"layers\.2.* is not served", RefusedModel, only=names)


def test_a_model_of_torch_that_leaves_early() -> None:
    model, x = Plain(), tokens(4)
    model.blocks.append(model.blocks[0].__class__())
    model.forward = lambda x: blocks(list(model.blocks)[:2], x)
    with torch.no_grad(), attach(model, Sends(((0, 0, 1, 2),), 0), inputs=x) as run:
        with pytest.raises(SiteError, match=r"merged behind blocks\.0\.attn, and the last layer"):
            run(x)
        model.forward = lambda x: blocks(list(model.blocks)[:2], blocks(list(model.blocks)[:2], x))
        with pytest.raises(SiteError, match=r"merged behind blocks\.0\.attn, and the last layer"):
            run(x)
        model.forward = lambda x: blocks(model.blocks, blocks(model.blocks, x))
        assert run(x).shape == x.shape  # from one end to the other, twice


def test_what_cannot_stand_beside_it() -> None:
    pair = Sends(((0, 0, 1),), 0)
    with pytest.raises(ClashError, match="what Shares reads would be of several"):
        pair | Shares()
    with pytest.raises(ClashError, match="what Shares reads would be of several"):
        Shares().on(layers=0) | pair.on(layers=1)
    with pytest.raises(ClashError, match="both merge tokens"):
        pair.on(layers=0) | replace(pair, layer=1).on(layers=1)


def test_marks() -> None:
    with pytest.raises(DefinitionError, match="at RESIDUAL"):
        at(Site.OUTPUT, merges=True)
    with pytest.raises(DefinitionError, match="set `causal` and `chunk_invariant` to False"):

        class Careless(Method):
            paper = PAPER
            causal = False

            @at(Site.RESIDUAL, merges=True)
            def merge(self, stream: Tensor, call: Call) -> Tensor:
                return stream


class Unsaid(Method):
    """Merges and does not say so."""

    paper = PAPER

    @at(Site.RESIDUAL)
    def merge(self, stream: Tensor, call: Call) -> Any:
        return Merged(stream[:, :1], torch.zeros(stream.shape[:2], dtype=torch.long))


class Says(Sends):
    """Gives what it is told, whatever it is."""

    left: int = 3
    whole: bool = True

    @at(Site.RESIDUAL, merges=True)
    def send(self, stream: Tensor, call: Call) -> Tensor | Merged:
        to = torch.tensor(self.to).expand(len(stream), -1)
        return Merged(stream[:, : self.left], to if self.whole else to.double())


BAD = {
    "numbers the 3 tokens left": [((0, 1, 2, 3),), ((0, 1, 2, -2),)],
    "in the order of the first": [((1, 0, 2, 2),), ((0, 0, 1, 1),), ((0, 2, 2, -1),), ((-1, -1, -1, -1),)],
    "a stream": [((0, 1, 2),)],
}


@pytest.mark.parametrize(("match", "to"), [(match, to) for match, each in BAD.items() for to in each])
def test_numbers_that_are_none(match: str, to: To) -> None:
    x = tokens(4)
    with torch.no_grad(), pytest.raises(SiteError, match=match), attach(Plain(), Says(to), inputs=x) as run:
        run(x)


def test_values_that_are_none() -> None:
    x = tokens(4)
    for what, match in (
        (Unsaid(), "mark it @at"),
        (Says(((0, 1, 2, 2),), whole=False), "a stream"),
        (Says(((0, 1, 2, 2),), left=0), "a stream"),
    ):
        with torch.no_grad(), pytest.raises(SiteError, match=match), attach(Plain(), what, inputs=x) as run:
            run(x)


def test_one_row_may_be_left_with_fewer_but_not_with_none() -> None:
    x = tokens(4)
    fine, none = ((0, 1, 2, 2), (0, -1, -1, -1)), ((0, 1, 2, 2), (-1, -1, -1, -1))
    with torch.no_grad(), attach(Plain(), Sends(fine), inputs=x) as run:
        assert bool(run(x).isfinite().all())
    with torch.no_grad(), pytest.raises(SiteError, match="every row"), attach(Plain(), Sends(none), inputs=x) as run:
        run(x)


def test_an_error_leaves_nothing_behind() -> None:
    """What was merged before a fault is forgotten with that forward."""
    model, x = Plain(), tokens(4)
    fault = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), attach(model, Sends(((0, 0, 1, 2),), 0), inputs=lambda: model.blocks[0](x)) as run:
        with pytest.raises(ZeroDivisionError):
            run(x)
        fault.remove()
        assert run.state.now.merges == {}
