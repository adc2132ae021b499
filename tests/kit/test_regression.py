"""Logistic regression against its conditions of optimality."""

from __future__ import annotations

import torch

from heedful.conformance.tolerances import close_model
from heedful.kit.regression import logistic


def test_a_regression_is_where_its_gradient_is_zero() -> None:
    random = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(40, 5, generator=random, dtype=torch.float64) + 1
    x[:, 1] /= 100
    x[:, 4] = 7.0  # tells nothing, and does not vary
    y = (x[:, 0] + torch.randn(40, generator=random) > 1).double()
    found = {name: t.double() for name, t in logistic(x, y).items()}
    assert close_model(found["mean"].float(), x.mean(0).float())
    spread = ((x - x.mean(0)).square().mean(0)).sqrt()
    assert close_model(found["deviation"].float(), torch.where(spread > 0, spread, 1.0).float())
    z = (x - found["mean"]) / found["deviation"]
    off = y - 1 / (1 + (-(z @ found["weight"] + found["bias"])).exp())
    assert close_model(found["weight"].float(), (z.mT @ off).float())  # half the squared length has itself as gradient
    assert abs(float(off.sum())) < 1e-4
    assert float(found["weight"][0]) > 0.5
