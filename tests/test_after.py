"""A fit may look at a copy of the model whose weights it edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from heedful import fit, models, operate
from heedful.core.entry import FitContext
from heedful.core.method import Stack
from heedful.methods import Absmax


def test_the_copy_is_as_operate_makes_it_and_the_model_stays() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    found: list[torch.Tensor] = []

    class Looks(Absmax):
        def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Looks:
            twice = context.after(Absmax(3)).after(Absmax(2, projections="o"))
            for of in (context, context.after(Absmax(3)), twice):
                with of.attach(Stack()) as run:
                    found.append(run(**inputs).logits)
            found.append(twice.weights(1).o)
            return self

    before = {name: x.clone() for name, x in model.state_dict().items()}
    fit(Looks(), model, [])
    small = operate(model, Absmax(3))
    smaller = operate(small, Absmax(2, projections="o"))
    with torch.no_grad():
        for one, logits in zip((model, small, smaller), found, strict=False):
            assert torch.equal(one(**inputs).logits, logits)
    assert torch.equal(found[3].flatten(1), smaller.model.layers[1].self_attn.o_proj.weight)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
