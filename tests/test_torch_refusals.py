"""What no run can follow in a model of plain torch is refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.probe import Look
from heedful import attach
from heedful.adapters.choosing import adapter_for
from heedful.core.errors import FieldError, HeedfulError, NotEntered, RefusedModel
from heedful.tiny import tiny

from .test_torch_modules import Halve
from .torch_models import Attention, Plain, tokens


class Threaded(nn.Module):
    """Runs a part of the model in a thread of its own."""

    def __init__(self, part: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.call = part, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.part, x)


def in_thread(part: nn.Module, x: Tensor) -> Tensor:
    out: list[Any] = []

    def work() -> None:
        try:
            with torch.no_grad():
                out.append(part(x))
        except HeedfulError as error:
            out.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(out[0], HeedfulError):
        raise out[0]
    return out[0]


@torch.no_grad()
def test_other_threads_are_refused() -> None:
    model, x = Threaded(Plain(), in_thread), tokens()
    with pytest.raises(RefusedModel, match="runs in a thread of its own"):
        attach(model, Look(), inputs=x)
    model.call = lambda part, x: part(x)
    with attach(model, Look(), inputs=x) as run:
        run(x)
        model.call = in_thread
        with pytest.raises((NotEntered, FieldError), match="thread"):
            run(x)


class Own(nn.Module):
    """Attention written out, whose weights are squared."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.soft, self.drop = how, nn.Softmax(-1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT
        if self.how == "module":
            return self.drop(self.soft(scores).square()) @ x
        if self.how == "einsum":
            return torch.einsum("bqk,bkd->bqd", F.softmax(scores, -1).to(x.dtype) ** 2, x)
        return torch.bmm(scores.softmax(-1).view(scores.shape).pow(2), x)


class Several(nn.Module):
    def __init__(self, same: bool) -> None:
        super().__init__()
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        q, k = x.view(2, 10, 2, 16).transpose(1, 2).chunk(2, -1)
        a, b = (F.scaled_dot_product_attention(q, k, q if self.same else q + i) for i in (0, 1))
        return (a - b).transpose(1, 2).reshape(2, 10, -1)


class Channels(nn.Module):
    num_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(2, 10, 2, 16).permute(0, 2, 3, 1)
        return F.scaled_dot_product_attention(q, q, q).permute(0, 3, 1, 2).reshape(2, 10, -1)


OWN = {
    "module": (Own("module"), "a softmax of its own"),
    "einsum": (Own("einsum"), "a softmax of its own"),
    "bmm": (Own("bmm"), "a softmax of its own"),
    "difference": (Several(same=True), "2 calls in one forward, combined"),
    "several": (Several(same=False), "2 calls in one forward, none of which"),
    "channels": (Channels(), "over channels, not over tokens"),
}


class Mixed(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.served, self.own = Attention(), own

    def forward(self, x: Tensor) -> Tensor:
        return self.served(x) + self.own(x).mean()


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_attention_that_is_no_map_of_torchs_function_is_refused_by_name(name: str) -> None:
    module, why = OWN[name]
    model, x = Mixed(module), tokens()
    with pytest.raises(RefusedModel, match=rf"own \({type(module).__name__}: {why}.*only=\['served'\]"):
        attach(model, Look(), inputs=x)
    with pytest.raises(RefusedModel, match=f"calls no attention of torch's.*{why}"):
        attach(nn.Sequential(module), Look(), inputs=x)
    with attach(model, Look(), inputs=x, only="served") as run:
        run(x)
    assert run.layer_names == ("served",)


def test_softmaxes_that_are_no_attention_are_none() -> None:
    class Router(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.softmax(-1) + x @ x.mT @ x

    attach(Mixed(Router()), Look(), inputs=tokens()).close()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@torch.no_grad()
def test_scripted_attention_is_refused() -> None:
    class Scripted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    class Harmless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(RefusedModel, match=r"own \(.*scripted\)"):
        attach(Mixed(torch.jit.script(Scripted())), Look(), inputs=tokens())
    attach(Mixed(torch.jit.script(Harmless())), Look(), inputs=tokens()).close()


@torch.no_grad()
def test_a_module_that_changes_its_mind_is_found_out() -> None:
    model, x = Plain(), tokens()
    with attach(model, Halve()) as run:
        run(x)
        model.blocks[0].attn.kernel = lambda query, key, value: query
        with pytest.raises(NotEntered, match="did not pass through heedful"):
            run(x)
        model.blocks[0].attn.kernel = lambda **how: F.scaled_dot_product_attention(
            **{**how, "query": F.scaled_dot_product_attention(**how)}
        )
        with pytest.raises(NotEntered, match="calls attention twice"):
            run(x)


@pytest.mark.parametrize("only", [3, [3], ("served", None)])
def test_parts_that_are_no_names_are_refused_in_models_of_either_kind(only: Any) -> None:
    for model in (Mixed(Attention()), tiny("llama")):
        with pytest.raises(FieldError, match=r"only.*must be dotted names of parts of the model"):
            adapter_for(model, only)
