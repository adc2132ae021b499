"""Attention whose pieces are computed by modules inside it, and attention around attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.coverage.probe import Look, Through
from heedful import Site, attach, edit
from heedful.conformance.tolerances import close_model
from heedful.core.errors import RefusedModel

from .samples import Zero
from .torch_models import tokens

IDS = torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing with Through")


def squeeze_bert() -> nn.Module:
    """Each of its products is made by a module of its own, and its streams have channels before tokens."""
    groups = ("q", "k", "v", "post_attention", "intermediate", "output")
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.SqueezeBertConfig(
        vocab_size=64, num_attention_heads=4, **sizes, **{f"{name}_groups": 1 for name in groups}
    )
    return transformers.SqueezeBertModel(config).eval()


@torch.no_grad()
def test_the_layer_is_the_module_around_what_multiplies() -> None:
    model, given = squeeze_bert(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    plain = model(**given)[0]
    with attach(model, Through(), backend="reference") as run:
        assert run.layer_names == tuple(f"encoder.layers.{i}.attention" for i in (0, 1))
        assert close_model(run(**given)[0], plain)
    with attach(model, Zero()) as run:
        zeroed = run(**given)[0]
    for layer in model.encoder.layers:
        layer.attention.value.weight.zero_()
        layer.attention.value.bias.zero_()
    assert close_model(zeroed, model(**given)[0])


@torch.no_grad()
def test_hidden_states_are_tokens_before_channels() -> None:
    model, given = squeeze_bert(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    shapes: list[torch.Size] = []

    def doubled(x: Tensor, call: object) -> Tensor:
        shapes.append(x.shape)
        return 2 * x

    with attach(model, edit(Site.HIDDEN, doubled)) as run:
        found = run(**given)[0]
        assert {size.width for size in run._adapter.sizes()} == {32}
    assert shapes == [(2, 10, 32)] * 2
    for layer in model.encoder.layers:
        for conv in (layer.attention.query, layer.attention.key, layer.attention.value):
            conv.weight *= 2
    assert close_model(found, model(**given)[0])


class Kernel(nn.Module):
    """Calls torch's attention, and a module that does the same."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return out if self.inner is None else out + self.inner(x)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
@torch.no_grad()
def test_a_layer_around_another_has_its_own_calls_alone(layers: tuple[int, ...]) -> None:
    model, x = nn.Sequential(Kernel(Kernel())), tokens()
    plain = model(x)
    with attach(model, Look().on(layers=layers), inputs=x) as run:
        assert sorted(run.layer_names) == ["0", "0.inner"]
        assert close_model(run(x), plain)
        assert run.activity().entered == (0, 1)


class Handed(nn.Module):
    """Hands a product to the module around it, which squares the weights or not."""

    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    def __init__(self, square: bool) -> None:
        super().__init__()
        self.square, self.first, self.second = square, self.Product(), self.Product()

    def forward(self, x: Tensor) -> Tensor:
        weights = self.first(x, x.mT).softmax(-1)
        return self.second(weights**2 if self.square else weights, x)


@torch.no_grad()
def test_what_cannot_be_followed_is_told_of_the_module_around() -> None:
    x = tokens()
    with pytest.raises(RefusedModel, match=r"0 \(Handed: a softmax of its own: its weights are changed"):
        attach(nn.Sequential(Handed(square=True)), Look(), inputs=x)
    model = nn.Sequential(Handed(square=False))
    before = copy.deepcopy(model)(x)
    with attach(model, Look(), inputs=x) as run:
        assert run.layer_names == ("0",)
        assert close_model(run(x), before)


class Placed(nn.Module):
    """Places are told by a module of its own, as in timm's BottleneckAttn, whose product is no score."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.places = nn.Linear(16, 48), _Places()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, 4)).movedim(2, 0).transpose(-2, -3)
        return ((q @ k.mT + self.places(q)).softmax(-1) @ v).transpose(1, 2).flatten(2)


class _Places(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return (q @ torch.ones(6, 4).mT).tanh()


@torch.no_grad()
def test_a_product_beside_the_scores_is_no_more_than_added() -> None:
    net, x = nn.Sequential(Placed()).eval(), torch.randn(2, 6, 16)
    with attach(net, Zero().on(heads=[1]), inputs=x) as run:
        assert run.layer_names == ("0",)
        found = run(x)
    assert torch.equal(found == 0, (torch.arange(16) // 4 == 1).expand_as(found))
    assert close_model(found + net(x) * (found == 0), net(x))


class Viewed(Placed):
    """Values stand before the weights, and their product is viewed at once, as in LeViT with convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, 4)).movedim(2, 0).transpose(-2, -3)
        return (v.mT @ (q @ k.mT).softmax(-1).mT).view(len(x), -1, x.shape[1]).mT


@torch.no_grad()
def test_what_is_given_back_may_be_viewed() -> None:
    net, x = nn.Sequential(Viewed()).eval(), torch.randn(2, 6, 16)
    with attach(net, Zero().on(heads=[1]), inputs=x) as run:
        found = run(x)
    assert torch.equal(found == 0, (torch.arange(16) // 4 == 1).expand_as(found))
