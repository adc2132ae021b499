"""Weibull fits of weights whose distribution is known."""

import math

import pytest
import torch

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, StatisticError
from heedful.methods.observe.weibull_weights import GAUSSIAN, WeibullWeights, _spread


@pytest.mark.parametrize(("shape", "scale"), [(0.7, 0.02), (1.0, 3.0), (2.5, 0.1)])
def test_finds_the_weibull_that_weights_were_drawn_from(shape: float, scale: float) -> None:
    u = torch.linspace(0, 1, 400_002, dtype=torch.float64)[1:-1]  # exact quantiles: no luck of the draw
    x = scale * (-torch.log1p(-u)) ** (1 / shape)
    sign = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)
    found = WeibullWeights().line(x * sign)
    assert found[0] == pytest.approx(shape, rel=2e-3)
    assert found[1] == pytest.approx(scale, rel=2e-3)
    assert found[2] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_a_gaussian_has_the_shape_of_the_paper(spread: float) -> None:
    u = torch.linspace(0.5, 1, 400_001, dtype=torch.float64)[:-1]
    found = WeibullWeights().line(spread * math.sqrt(2) * torch.erfinv(2 * u - 1))
    assert found[0] == pytest.approx(GAUSSIAN, abs=2e-3)
    assert found[1] == pytest.approx(0.8875 * spread, rel=2e-3)  # the paper's too


def test_tails_do_not_count() -> None:
    x = torch.randn(200_000)
    x[:10_000] *= 1e4
    # a twentieth of the weights is large: the middle 80 % bends a little, nearly all of them bend much
    assert WeibullWeights().line(x)[0] == pytest.approx(GAUSSIAN, abs=0.05)
    assert WeibullWeights(0.999).line(x)[0] < 0.9


def test_zeros_are_left_out_and_equal_weights_have_no_shape() -> None:
    x = torch.randn(50_000)
    assert close(WeibullWeights().line(torch.cat([x, torch.zeros(9_000)])), WeibullWeights().line(x))
    for alike in (torch.ones(100), -0.3 * torch.ones(100), torch.zeros(100)):
        found = WeibullWeights().line(alike)
        assert found.shape == (3,)
        assert found.isnan().all()


def test_every_projection_of_every_layer_and_the_model_stays() -> None:
    model = models.tiny("llama", num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    with torch.no_grad():
        heavy = model.model.layers[1].self_attn.k_proj.weight
        heavy.copy_(heavy.sign() * heavy.abs() ** 2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = heedful.fit(WeibullWeights(), model, ())
    assert found.shapes.shape == (2, 4)
    heavy_shape = float(found.shapes[1, 1])
    others = found.shapes.flatten()[[0, 1, 2, 3, 4, 6, 7]]
    assert heavy_shape == pytest.approx(GAUSSIAN / 2, rel=0.1)  # a power takes the shape down by as much
    assert torch.all((others - GAUSSIAN).abs() < 0.12)
    assert close(found.line(model.model.layers[1].self_attn.k_proj.weight)[0], found.shapes[1, 1])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    told = found.describe()
    assert list(told.figures[0].lines) == ["queries", "keys", "values", "output", "a Gaussian"]
    assert "median shapes" in told.findings[0].text


def test_a_sample_is_spread_over_the_whole_matrix() -> None:
    assert _spread(10, 4, torch.device("cpu")).tolist() == [0, 3, 6, 9]
    u = torch.linspace(0, 1, 40_002, dtype=torch.float64)[1:-1]
    sizes = -torch.log1p(-u)  # from small to large, so that any part of them has another shape
    whole, some = WeibullWeights().line(sizes), WeibullWeights(sample=4000).line(sizes)
    assert some[0] == pytest.approx(float(whole[0]), rel=0.01)
    assert some[1] == pytest.approx(float(whole[1]), rel=0.01)
    assert not torch.equal(some, whole)
    assert torch.equal(WeibullWeights(sample=40_000).line(sizes), whole)


def test_says_what_is_wrong() -> None:
    with pytest.raises(FieldError, match="sample"):
        WeibullWeights(sample=999)
    with pytest.raises(FieldError, match="middle"):
        WeibullWeights(1.0)
    with pytest.raises(StatisticError, match=r"heedful\.fit"):
        WeibullWeights().describe()


def test_both_ends_of_the_middle_belong_to_it() -> None:
    """Two values, each half of the weights, stand at a quarter and three quarters of them."""
    shape, scale, r2 = WeibullWeights(middle=0.5).line(torch.tensor([1.0, -1.0, 2.0, 2.0])).tolist()
    low, high = (math.log(2) * x for x in (0.5 / 1024, 1 - 0.5 / 1024))  # the middles of the outer bins of 1024
    y = [math.log(-math.log(1 - p)) for p in (0.25, 0.75)]
    assert shape == pytest.approx((y[1] - y[0]) / (high - low), rel=1e-6)
    assert scale == pytest.approx(math.exp(low - y[0] / shape), rel=1e-6)
    assert r2 == pytest.approx(1.0)
