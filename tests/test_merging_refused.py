"""Models and stacks in which no tokens can be merged are refused by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Backbone, Dinov2Config

from benchmarks.beside_torch import library
from benchmarks.coverage.library_cases import PICTURES, SMALL
from heedful import attach, models
from heedful.core.call import Call, Merged
from heedful.core.errors import ClashError, DefinitionError, RefusedModel, SiteError
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.methods import TempScale, ToMe

from .merging_by_hand import SIXTEEN, Sends, To, blocks, image_model
from .samples import PAPER, Narrow, Shares
from .torch_models import Plain, tokens


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


def test_inner_streams_that_timm_is_asked_for() -> None:
    model = library("timm").create_model("vit_tiny_patch16_224", **SMALL).eval()
    with torch.no_grad():
        plain = model.forward_intermediates(PICTURES)[1]
        with attach(model, ToMe(8), inputs=PICTURES) as run:
            for wanted in (None, 2, [0], (0, 1), [-2, -1]):
                with pytest.raises(RefusedModel, match=r"VisionTransformer makes maps of the streams behind its layer"):
                    model.forward_intermediates(PICTURES, wanted)
                with pytest.raises(RefusedModel, match=r"let it give that of the last alone, \[1\]"):
                    model.forward_intermediates(PICTURES, indices=wanted, norm=True)
            for wanted in (1, [1], (-1,)):
                (found,) = model.forward_intermediates(PICTURES, wanted, intermediates_only=True)
                assert found.shape == plain[1].shape
                assert not torch.equal(found, plain[1])
            assert run(PICTURES).shape == (2, 5)
        for found, want in zip(model.forward_intermediates(PICTURES)[1], plain, strict=True):
            assert torch.equal(found, want)
    with attach(model, TempScale(0.5), inputs=PICTURES):
        assert len(model.forward_intermediates(PICTURES)[1]) == 2
    last = library("timm").create_model("vit_tiny_patch16_224", features_only=True, out_indices=(1,), **SMALL).eval()
    with torch.no_grad(), attach(last, ToMe(8), inputs=PICTURES) as run:
        assert run(PICTURES)[0].shape == plain[1].shape


def test_a_list_that_ends_with_a_layer_of_before() -> None:
    model, x = Plain(), tokens(4)
    model.blocks.append(model.blocks[1])
    with pytest.raises(RefusedModel, match="blocks ends with a layer that it runs before too"):
        attach(model, Sends(((0, 0, 1, 2),), 0), inputs=x)


def test_keys_that_a_layer_has_of_its_own() -> None:
    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (torch.cat([torch.ones_like(x[:, :, :3]), x], 2) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    model, x = Plain(), tokens(4)
    for block in model.blocks:
        block.attn.kernel = kernel
    match = "layer 0: tokens are merged where each attends to all, and here keys are another sequence's"
    with torch.no_grad(), pytest.raises(SiteError, match=match), attach(model, Sends(((0, 0, 1, 2),)), inputs=x) as run:
        run(x)


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
