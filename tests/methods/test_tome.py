"""ToMe against a vision transformer written out, image by image and token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from claims._pictures import denoiser
from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning, SiteError
from heedful.methods import AdaptiveSparseViT, TokenPooling, ToMe

from ..torch_models import Plain, tokens
from ..two_doors import PICTURES, siglip


def image_model(layers: int = 4) -> tuple[Any, dict[str, Tensor]]:
    model = models.tiny("vit", num_hidden_layers=layers, image_size=16, attn_implementation="eager")
    return model, models.tiny_inputs(model, batch=3)


def attended(part: Any, x: Tensor, sizes: list[float]) -> tuple[Tensor, Tensor]:
    """What attention adds to tokens `[n e]`, which count by their sizes, and the mean of their keys over heads."""
    heads = part.num_attention_heads
    q, k, v = (m(x).unflatten(-1, (heads, -1)) for m in (part.q_proj, part.k_proj, part.v_proj))
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(len(x)):
            scores = [float(q[i, h] @ k[j, h]) * q.shape[-1] ** -0.5 + math.log(sizes[j]) for j in range(len(x))]
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            out[i, h] = sum(w * v[j, h] for j, w in enumerate(weights)) / sum(weights)
    return part.o_proj(out.flatten(1)), k.mean(1)


def merged(x: Tensor, keys: Tensor, sizes: list[float], names: list[set[int]], count: int) -> Any:
    """The `count` best pairs of an even and an odd token join; the class token, which is the first, joins nobody."""
    cosine = [[float(torch.cosine_similarity(a, b, dim=0)) for b in keys] for a in keys]
    best = {i: max(range(1, len(x), 2), key=lambda j: (cosine[i][j], -j)) for i in range(2, len(x), 2)}
    moves = sorted(best, key=lambda i: -cosine[i][best[i]])[:count]
    for i in moves:
        names[best[i]] |= names[i]
    total = [x[i] * sizes[i] for i in range(len(x))]
    new = list(sizes)
    for i in moves:
        total[best[i]] = total[best[i]] + total[i]
        new[best[i]] += sizes[i]
    left = sorted((i for i in range(len(x)) if i not in moves), key=lambda i: min(names[i]))
    return torch.stack([total[i] / new[i] for i in left]), [new[i] for i in left], [names[i] for i in left]


def by_hand(model: Any, pixels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last hidden states of all tokens, and the logits."""
    x = model.vit.embeddings(pixels[None])[0]
    sizes, names = [1.0] * len(x), [{i} for i in range(len(x))]
    n, layers = len(x), list(model.vit.layers)
    for number, layer in enumerate(layers):
        added, keys = attended(layer.attention, layer.layernorm_before(x), sizes)
        x = x + added
        x = x + layer.mlp(layer.layernorm_after(x))
        if number < len(layers) - 1:
            x, sizes, names = merged(x, keys, sizes, names, count)
    whole = torch.stack([next(x[j] for j, mine in enumerate(names) if i in mine) for i in range(n)])
    normed = model.vit.layernorm(whole)
    return normed, model.classifier(normed[0])


@pytest.mark.parametrize("count", [1, 3, 5, 30])
@torch.no_grad()
def test_the_most_alike_join(count: int) -> None:
    model, inputs = image_model()
    seen: list[Tensor] = []
    hook = model.vit.layernorm.register_forward_hook(lambda _, args, out: seen.append(out))
    with attach(model, ToMe(count)) as run:
        logits = run(**inputs).logits
        assert run.active
    hook.remove()
    for row, pixels in enumerate(inputs["pixel_values"]):
        states, want = by_hand(model, pixels, count)
        assert close_model(seen[0][row], states)
        assert close_model(logits[row], want)


@torch.no_grad()
def test_so_many_are_left_to_each_layer() -> None:
    model, inputs = image_model()
    counts: list[int] = []
    hooks = [x.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1])) for x in model.vit.layers]
    for count, want in ((3, [17, 14, 11, 8]), (8, [17, 9, 5, 3]), (30, [17, 9, 5, 3])):
        counts.clear()
        with attach(model, ToMe(count)) as run:
            assert run(**inputs, output_hidden_states=True).logits.shape == (3, model.config.num_labels)
        assert counts == want
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_the_class_token_stays_itself_whoever_says_where_patches_are() -> None:
    model, inputs = image_model()
    with attach(model, ToMe(8)) as run:
        want = run(**inputs).logits
    with attach(model, ToMe(8), roles={"patches": ((1, 17),)}) as run:
        assert torch.equal(run(**inputs).logits, want)


@torch.no_grad()
def test_at_most_half_of_what_may_join_joins() -> None:
    model, x = Plain(), tokens(9)
    counts: list[int] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    for patches in ((0, 9), (1, 9), (2, 9), (3, 9)):  # what stands before is fixed, as a class token and registers
        with attach(model, ToMe(30), roles={"patches": (patches,)}, inputs=x) as run:
            counts.clear()
            run(x)
        assert counts == [9 - (9 - patches[0]) // 2]


@torch.no_grad()
def test_whatever_is_no_patch_joins_nobody() -> None:
    model, x = Plain(), tokens(9)
    x[:, 1], x[:, 6] = x[:, 2] + 0.2 * x[:, 8], x[:, 5] + 0.2 * x[:, 8]  # the likest pairs, of which one is fixed each
    before, seen = model.blocks[0](x), list[Tensor]()
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with attach(model, ToMe(30), roles={"patches": ((2, 6), (7, 9))}, inputs=x) as run:
        run(x)
    for text, left in zip(before, seen[-1], strict=True):
        for fixed in (0, 1, 6):
            assert any(close_model(text[fixed], y) for y in left)


@torch.no_grad()
def test_padding_is_nothing_that_joins_or_counts() -> None:
    model = models.tiny("bert", num_hidden_layers=3)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    for count, roles in ((2, {}), (30, {}), (30, {"patches": ((0, 12),)})):
        with attach(model.base_model, ToMe(count), roles=roles) as run:
            found = run(input_ids=ids, attention_mask=mask).last_hidden_state
        for b, length in enumerate((12, 7)):
            with attach(model.base_model, ToMe(count), roles=roles) as run:
                alone = run(input_ids=ids[b : b + 1, :length]).last_hidden_state[0]
            assert close_model(found[b, :length], alone)


@torch.no_grad()
def test_one_layer_alone_merges_nothing() -> None:
    model, inputs = image_model(1)
    plain = model(**inputs).logits
    with pytest.warns(InactiveWarning), attach(model, ToMe(4), backend="reference") as run:
        assert torch.equal(run(**inputs).logits, plain)
    model, inputs = image_model()
    with attach(model, ToMe(4).on(layers=[1, 3])) as run:
        some = run(**inputs).logits
    assert not close_model(some, model(**inputs).logits)


@torch.no_grad()
def test_the_last_layer_of_an_encoder_merges_nothing_where_other_layers_come_behind_it() -> None:
    model = models.tiny("llava")
    inputs, found = models.tiny_inputs(model), []
    hook = model.model.vision_tower.register_forward_hook(lambda _, __, out: found.append(out.last_hidden_state))
    for what, only in ((ToMe(2).on(layers=(0, 1)), None), (ToMe(2), ("model.vision_tower",))):
        with attach(model, what, only=only) as run:
            run(**inputs, use_cache=False)
    hook.remove()
    assert torch.equal(*found)
    assert len(set(map(tuple, found[0][0].tolist()))) < found[0].shape[1]


@torch.no_grad()
def test_it_begins_anew_with_each_image() -> None:
    model, inputs = image_model()
    with attach(model, ToMe(4)) as run:
        first = run(**inputs).logits
        assert torch.equal(run(**inputs).logits, first)


class Pair(nn.Module):
    """One encoder that reads two things in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Plain()

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(one), self.encoder(other)


@pytest.mark.parametrize("length", [8, 6, 4])  # of 6 tokens there are when those of the first have been merged
@torch.no_grad()
def test_it_begins_anew_with_each_pass_of_one_forward(length: int) -> None:
    model, one, other = Pair(), tokens(8), tokens(length)
    with attach(model, ToMe(2), inputs=(one, other)) as run:
        found = run(one, other)
    with attach(model.encoder, ToMe(2), inputs=one) as run:
        assert torch.equal(found[0], run(one))
        assert torch.equal(found[1], run(other))


@torch.no_grad()
def test_a_decoder_behind_a_merged_encoder_is_refused_in_words() -> None:
    model = models.tiny("bart")
    with (
        attach(model, ToMe(2)) as run,
        pytest.raises(SiteError, match=r"ToMe.*: (the model is causal|tokens are merged where each)"),
    ):
        run(**models.tiny_inputs(model), use_cache=False)


@pytest.mark.parametrize("method", [ToMe(8), TokenPooling((0, 1)), AdaptiveSparseViT((0, 1))])
def test_places_that_look_at_words_are_refused_before_words_are_taken_for_them(method: Any) -> None:
    net = denoiser()
    inputs = {"noised": torch.randn(2, 3, 16, 16), "t": torch.tensor([0.5, 0.5]), "context": torch.randn(2, 5, 64)}
    refused = pytest.raises(SiteError, match="layer 1: tokens are merged where each attends to all, and here keys are")
    with refused, attach(net, method, inputs=inputs) as run:
        run(**inputs)


@torch.no_grad()
def test_a_head_that_pools_what_was_merged_is_served() -> None:
    model = siglip().vision_model
    with attach(model, ToMe(2)) as run:
        run(pixel_values=PICTURES)
        assert run.activity().entered == (0, 1, 2)
        assert run.state.calls[2].cross


def test_gradients_flow_through_the_means() -> None:
    model, inputs = image_model()
    pixels = inputs["pixel_values"].requires_grad_()
    with attach(model, ToMe(5)) as run:
        run(pixel_values=pixels).logits.square().sum().backward()
    assert pixels.grad is not None
    assert bool(pixels.grad.isfinite().all() & (pixels.grad.abs().sum((1, 2, 3)) > 0).all())


def test_bad_fields() -> None:
    with pytest.raises(FieldError, match="count"):
        ToMe(-1)
