"""Logistic regression against its conditions of optimality."""

from __future__ import annotations

import pytest
import torch

from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.kit.regression import log_odds, logistic
from heedful.methods import Sentinel


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


def test_what_a_fit_says_of_points() -> None:
    held = {"weight": [2.0, -1.0], "mean": [1.0, 0.5], "deviation": [0.5, 2.0], "bias": [0.25]}
    method = Sentinel(probe=Fitted({name: torch.tensor(x) for name, x in held.items()}))
    points = torch.tensor([[[3.0, 4.5], [1.0, 0.5]]])
    assert log_odds(method, "probe", points).tolist() == [[2 * 4 - 2 + 0.25, 0.25]]
    with pytest.raises(FieldError, match="to points of 2 numbers, and these are of 3"):
        log_odds(method, "probe", torch.zeros(4, 3))
    drawn = torch.randn(2, generator=torch.Generator().manual_seed(5))
    assert close(log_odds(Sentinel(seed=5), "probe", points), points @ drawn)
