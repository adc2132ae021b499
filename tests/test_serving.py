"""What a model may be besides a plain one: biases yet to be learned, wrapped, fused, 2-D, offloaded."""

from __future__ import annotations

import pytest
import torch

from benchmarks.coverage import tiny as zoo
from heedful import attach
from heedful.conformance.tolerances import close_model

from .samples import Scale

pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


def test_a_bias_that_is_zero_learns() -> None:
    one = zoo.build("SwinModel")
    tables = [p for name, p in one.model.named_parameters() if "relative_position_bias" in name]
    for table in tables:
        table.data.zero_()

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(one.model(**one.inputs)[0].square().sum(), tables))

    wanted = gradients()
    with attach(one.model, Scale(1.0)):
        found = gradients()
    assert tables and all(g.any() for g in wanted)
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))
