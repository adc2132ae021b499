"""Tokens merged and dropped between layers, against models that are given fewer tokens by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.coverage.library_cases import PICTURES, vit
from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call, Merged
from heedful.core.errors import InactiveWarning
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.regions import PerText, Region
from heedful.core.sites import Site, at

from .merging_by_hand import (
    RAGGED,
    SIXTEEN,
    Sends,
    SendsTwice,
    Spy,
    To,
    alike,
    back,
    blocks,
    by_hand,
    expected,
    image_model,
    told,
    under,
)
from .samples import PAPER
from .test_residual import Push
from .torch_models import Plain, tokens


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
