"""What the code of a class tells of what it may do, wherever it is written."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.coverage.probe import Look
from heedful import attach
from heedful.adapters import suspects
from heedful.adapters.layers import own_attention
from heedful.core.errors import RefusedModel

from .test_unnamed import (
    Apart,
    AttnBlock,
    Decorated,
    Feature,
    Kernel,
    Logarithm,
    Logarithms,
    Net,
    Pooling,
    Router,
    Squared,
)
from .two_doors import IDS, llama

OTHER = ModuleType("other")
exec("def attends(x):\n    return (x @ x.mT).softmax(-1) @ x", vars(OTHER))


class Derived(Pooling):
    """All that it does is in a base."""


class Borrowed(nn.Module):
    """Asks for a function of another module by that module's name."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = OTHER.attends(x)
        return found


class Modular(nn.Module):
    """Its softmax is a module, and its products are written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        y @= x.mT
        y = self.weigh(y)
        y @= x
        return y


class Batched(nn.Module):
    """Its softmax is a logarithm's, its products are of matrices in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.LogSoftmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weigh(torch.bmm(x, x.mT)).exp(), x)


class Added(nn.Module):
    """Its products are added to something."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x, torch.baddbmm(x.new_zeros(1), x, x.mT).softmax(-1), x)


class Whole(nn.Module):
    """Calls what torch's own module does."""

    def forward(self, x: Tensor) -> Tensor:
        p = torch.zeros(24, 8), torch.zeros(24), None, None, False, 0.0, torch.eye(8), torch.zeros(8)
        return F.multi_head_attention_forward(x, x, x, 8, 2, *p)[0]


def test_code_tells_what_a_class_may_do() -> None:
    for kind in (Derived, Borrowed, Modular, Batched, Added):
        assert suspects.may_attend(kind), kind
    assert suspects.calls_kernel(Whole)
    for kind in (Pooling, Squared, Logarithm, Logarithms, Decorated, Apart, Router):
        assert suspects.may_attend(kind), kind
        assert not own_attention(kind), kind
    assert suspects.calls_kernel(Kernel)
    assert own_attention(Kernel)
    assert own_attention(AttnBlock)
    for other in (nn.Linear, nn.MultiheadAttention, nn.TransformerEncoderLayer, Net, Feature, type(llama())):
        assert not suspects.may_attend(other), other
        assert not suspects.calls_kernel(other), other


@torch.no_grad()
@pytest.mark.parametrize("kind", [Derived, Borrowed, Modular, Batched])
def test_it_is_refused_when_it_runs(kind: type[nn.Module]) -> None:
    with attach(llama(kind()), Look()) as run, pytest.raises(RefusedModel, match=rf"{kind.__name__}: nothing in its"):
        run(input_ids=IDS)


class Behind(Pooling):
    """Asks for torch's kernel by a name that its code does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = getattr(F, "scaled_dot_product_" + "attention")
        found: Tensor = kernel(x[:, None], x[:, None], x[:, None])[:, 0]
        return found if len(x) < 99 else super().forward(x)


class Rooted(LlamaForCausalLM):
    """A whole model, which mixes what comes of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = (out.logits @ out.logits.mT).softmax(-1) @ out.logits
        return out


@torch.no_grad()
def test_a_kernel_that_the_code_hides_is_seen_and_a_whole_model_is_none_of_its_parts() -> None:
    with attach(llama(Behind()), Look()) as run, pytest.raises(RefusedModel, match="Behind: nothing in its class"):
        run(input_ids=IDS)
    model = Rooted(llama(nn.Identity()).config).eval()
    assert suspects.may_attend(Rooted)
    with attach(model, Look()) as run:
        run(input_ids=IDS)
        assert run.activity().entered == (0, 1)
