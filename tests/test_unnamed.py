"""Attention in modules whose class does not speak of it, and attention without a softmax: served, or told of."""

from __future__ import annotations

import copy
import pickle
from functools import wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.probe import Look, Through
from heedful import attach
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import RefusedModel

from .samples import Keep
from .test_torch_modules import Halve
from .two_doors import IDS, llama

pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing with Through")
REST = r"only=\['model.layers.0.self_attn', 'model.layers.1'\]"
X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(2))


def scores_of(x: Tensor) -> Tensor:
    return x @ x.mT * x.shape[-1] ** -0.5


def pooled(x: Tensor) -> Tensor:
    return scores_of(x).softmax(-1) @ x


def by_kernel(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Pooling(nn.Module):
    """Nothing in its name, nor in its own text, says what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return pooled(x)


class Squared(nn.Module):
    """Changes its weights, which nobody follows."""

    def forward(self, x: Tensor) -> Tensor:
        return scores_of(x).softmax(-1).square() @ x


class Kernel(nn.Module):
    """Calls torch's attention in a function."""

    def forward(self, x: Tensor) -> Tensor:
        return by_kernel(x)


class Logarithm(nn.Module):
    """Takes a softmax by way of its logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(scores_of(x), -1).exp() @ x


class Logarithms(nn.Module):
    """Multiplies values with the logarithm itself."""

    def forward(self, x: Tensor) -> Tensor:
        return scores_of(x).log_softmax(-1) @ x


class Exponents(nn.Module):
    """Writes its softmax out."""

    def __init__(self, within: bool = False) -> None:
        super().__init__()
        self.within = within

    def forward(self, x: Tensor) -> Tensor:
        scores = scores_of(x)
        weights = scores - scores.amax(-1, keepdim=True)
        weights = weights.exp_() if self.within else torch.exp2(weights)
        return weights / weights.sum(-1, keepdim=True) @ x


class Router(nn.Module):
    """Has a softmax and products, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 32, 32) / 32)
        self.gate = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bne,eij,bnj->bni", self.gate(x).softmax(-1), self.experts, x)


class Experts(Router):
    """The same, whose router is a product with a weight."""

    def forward(self, x: Tensor) -> Tensor:
        gates = (x @ self.gate.weight.mT).softmax(-1)
        return torch.einsum("bne,bnei->bni", gates, torch.einsum("bnj,eij->bnei", x, self.experts))


class Latents(Router):
    """Attention whose queries are a weight, multiplied so that nobody follows it."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.gate.weight @ x.mT).softmax(-1)
        return x + torch.einsum("bei,ben->bni", torch.einsum("bni,ben->bei", x, weights), weights)


class Feature(nn.Module):
    """Exponents of what weights of its own give."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).exp() @ self.weight


class Net(nn.Module):
    """Modules one after another."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x
        return x


def around(function: Any) -> Any:
    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Decorated(nn.Module):
    """A decorator stands around its forward."""

    @around
    def forward(self, x: Tensor) -> Tensor:
        return pooled(x)


class Apart(nn.Module):
    """Calls a method of its own, which asks another module's function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) @ x

    @staticmethod
    def mixed(x: Tensor) -> Tensor:
        (weights,) = (torch.softmax(scores_of(y), -1) for y in (x,))
        return weights


class AttnBlock(nn.Module):
    """Its name says it, in short."""

    def forward(self, x: Tensor) -> Tensor:
        return pooled(x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Pooling, Squared, Logarithm, Logarithms, Decorated, Apart])
def test_attention_that_no_name_tells_of_is_refused_when_it_runs(kind: type[nn.Module]) -> None:
    model = llama(kind())
    plain = model(input_ids=IDS).logits
    with attach(model, Look()) as run:
        said = rf"mlp.attention \({kind.__name__}: nothing in its class says.*`inputs` would show.*{REST}"
        with pytest.raises(RefusedModel, match=said):
            run(input_ids=IDS)
        assert not run.state.statistics
    assert torch.equal(model(input_ids=IDS).logits, plain)
    assert "forward" not in vars(model.model.layers[0].mlp.attention)
    with attach(model, Halve(), only=["model.layers.0.self_attn", "model.layers.1"]) as run:
        run(input_ids=IDS)
        assert run.active


@torch.no_grad()
def test_inputs_show_attention_that_no_name_tells_of_and_then_it_is_served() -> None:
    given = {"input_ids": IDS}
    for kind in (Pooling, Logarithm):
        model = llama(kind())
        plain = model(input_ids=IDS).logits
        with attach(model, Through(), backend="reference", inputs=given) as run:
            assert run.layer_names[1] == "model.layers.0.mlp.attention"
            assert close_model(run(input_ids=IDS).logits, plain)
            assert run.activity().entered == (0, 1, 2)
        with attach(model, Halve().on(layers=1), inputs=given) as run:
            assert not close_model(run(input_ids=IDS).logits, plain)
    for wrong, why in ((Squared, "its weights are changed"), (Logarithms, "the logarithm of a softmax is used")):
        with pytest.raises(RefusedModel, match=rf"mlp.attention \({wrong.__name__}: a softmax.*{why}.*{REST}"):
            attach(llama(wrong()), Look(), inputs=given)


@torch.no_grad()
def test_a_kernel_is_served_whatever_the_class_is_called() -> None:
    for kind in (Kernel, AttnBlock):
        model = llama(kind())
        plain = model(input_ids=IDS).logits
        with attach(model, Through(), backend="reference") as run:
            assert close_model(run(input_ids=IDS).logits, plain)
            assert run.activity().entered == (0, 1, 2)


@torch.no_grad()
def test_what_only_may_be_attention_runs_as_ever() -> None:
    model = llama(Router(), nn.Identity())
    plain = model(input_ids=IDS).logits
    with attach(model, Look().when("decode")) as run:
        assert torch.equal(run(input_ids=IDS).logits, plain)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert "forward" not in vars(model.model.layers[0].mlp.attention)
    assert torch.equal(twin(input_ids=IDS).logits, plain)
    with attach(model, Look(), only="model.layers.1"):
        assert "forward" not in vars(model.model.layers[0].mlp.attention)
    with attach(llama(Router(), Pooling()), Look(), inputs={"input_ids": IDS}) as run:
        assert run.layer_names[1:] == ("model.layers.1.self_attn", "model.layers.1.mlp.attention")
    with attach(llama(Pooling()), Look(), only="model.layers.1") as run:
        run(input_ids=IDS)


@torch.no_grad()
def test_a_router_that_multiplies_with_a_weight_is_none_and_queries_that_are_one_are_attention() -> None:
    plain = (model := llama(Experts())).eval()(input_ids=IDS).logits
    with attach(model, Look().when("decode")) as run, torch.inference_mode():
        assert torch.equal(run(input_ids=IDS).logits, plain)
    with attach(model, Look(), inputs={"input_ids": IDS}) as run:
        assert run.layer_names == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    wide = torch.randn(2, 7, 32)
    for kind in (Router, Experts):  # where no layer is known by its class
        with pytest.raises(
            RefusedModel, match=rf"layers.1 \({kind.__name__}: a softmax of its own.*only=\['layers.0'\]"
        ):
            attach(Net(Pooling(), kind()), Look(), inputs=wide)
    with attach(llama(Latents()), Look()) as run, pytest.raises(RefusedModel, match=r"Latents: nothing in its class"):
        run(input_ids=IDS)
    with pytest.raises(RefusedModel, match=r"layers.1 \(Latents: a softmax of its own"):
        attach(Net(Pooling(), Latents()), Look(), inputs=wide)


@torch.no_grad()
def test_a_logarithm_on_the_way_to_weights_is_followed() -> None:
    model = Net(Logarithm(), Logarithm())
    with attach(model, Keep(), inputs=X) as run:
        assert run.layer_names == ("layers.0", "layers.1")
        run(X)
        assert close(run[0][0].value[0][:, 0], scores_of(X).softmax(-1))
    plain = model(X)
    with attach(model, Through(), backend="reference") as run:
        assert close_model(run(X), plain)


class Marred(nn.Module):
    """Writes into the logarithm before it is weights."""

    def forward(self, x: Tensor) -> Tensor:
        log = scores_of(x).log_softmax(-1)
        log += 1
        return log.exp() @ x


class Meddled(nn.Module):
    """Makes something else of the logarithm before it is weights."""

    def __init__(self, meddle: Any, hides: bool = False, keys: int | None = None) -> None:
        super().__init__()
        self.meddle, self.hides, self.keys = meddle, hides, keys

    def forward(self, x: Tensor) -> Tensor:
        scores = scores_of(x)
        if self.hides:
            scores = scores.masked_fill(torch.eye(x.shape[1], dtype=torch.bool), torch.finfo(x.dtype).min)
        return self.meddle(scores.log_softmax(-1)).exp() @ x[:, : self.keys]


class Given(nn.Module):
    """Gives the logarithm beside what it does with the weights."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = scores_of(x).log_softmax(-1)
        return self.last.exp() @ x


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Logarithms(), "the logarithm of a softmax is used"),
        (Marred(), "its weights are changed"),
        (Meddled(lambda log: 2 * log), "its weights are changed"),
        (Meddled(lambda log: F.dropout(log, 0.5, training=False)), "its weights are changed"),
        (Meddled(lambda log: log.masked_fill(log < -1e30, 0.0), hides=True), "its weights are changed"),
        (Meddled(lambda log: log.clone()[..., :5], keys=5), "the logarithm of a softmax is used"),
        (Given(), "its weights are changed"),
        (Exponents(), "made weights by exp"),
        (Exponents(within=True), "made weights by exp"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_weights_without_a_softmax_are_told_of_beside_others(module: nn.Module, why: str) -> None:
    with pytest.raises(RefusedModel, match=rf"layers.1 \({type(module).__name__}.*{why}.*only=\['layers.0'\]"):
        attach(Net(Pooling(), module), Look(), inputs=X)
    with attach(Net(Pooling(), module), Look(), inputs=X, only="layers.0") as run:
        run(X)
        assert run.activity().entered == (0,)


@torch.no_grad()
def test_what_is_made_of_a_logarithm_is_told_of_beside_the_interface() -> None:
    for module in (Meddled(lambda log: 2 * log), Meddled(lambda log: log[..., :5], keys=5)):
        with attach(llama(module), Look()) as run, pytest.raises(RefusedModel, match=r"Meddled: nothing in its class"):
            run(input_ids=IDS)


@torch.no_grad()
def test_exponents_of_what_weights_give_are_no_attention() -> None:
    with attach(Net(Pooling(), Feature()), Look(), inputs=X) as run:
        assert run.layer_names == ("layers.0",)


@torch.no_grad()
def test_layers_that_end_with_their_product_are_each_their_own() -> None:
    model = Net(Pooling(), Pooling(), Pooling())
    plain = model(X)
    with attach(model, Through(), backend="reference", inputs=X) as run:
        assert run.layer_names == ("layers.0", "layers.1", "layers.2")
        assert close_model(run(X), plain)


class Gated(nn.Module):
    """Its values are weighed by a softmax that is no attention."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bkd,bqk->bqd", x * x.softmax(-1), scores_of(x).softmax(-1))


@torch.no_grad()
def test_values_may_have_been_weighed_by_a_softmax_of_their_own() -> None:
    model = Net(Gated())
    plain = model(X)
    with attach(model, Through(), backend="reference", inputs=X) as run:
        assert run.layer_names == ("layers.0",)
        assert close_model(run(X), plain)
