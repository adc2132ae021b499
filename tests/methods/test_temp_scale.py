"""TempScale: scores over tau, everywhere."""

from __future__ import annotations

import pytest
import torch

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import HeadWeights
from heedful.methods.intervene.language.temp_scale import TempScale


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_temperature_is_a_smaller_divisor(kind: str) -> None:
    tau = 0.7
    model, other = models.tiny(kind), models.tiny(kind)
    inputs = models.tiny_inputs(model, length=17)
    with torch.no_grad():
        for module in other.modules():  # an independent way to sharpen: scale the query projection
            for name in ("q_proj", "query"):
                if name in dict(module.named_children()):
                    layer = module.get_submodule(name)
                    for p in layer.parameters():
                        p.div_(tau)
            if "c_attn" in dict(module.named_children()):
                for p in module.get_submodule("c_attn").parameters():
                    p[..., : p.shape[-1] // 3].div_(tau)
        wanted = other(**inputs).logits
        with attach(model, TempScale(tau)) as run:
            found = run(**inputs).logits
    assert close_model(found, wanted)


def test_neutral_is_the_model_itself_bit_for_bit() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        native = model(**inputs).logits
        with pytest.warns(match="changed nothing"), attach(model, TempScale.neutral(), backend="reference") as run:
            assert torch.equal(run(**inputs).logits, native)


@pytest.mark.parametrize("tile_rows", [1, 5, 64])
def test_tiles_agree(tile_rows: int) -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model, length=19)
    with torch.no_grad():
        with attach(model, TempScale(0.5), backend="reference") as run:
            wanted = run(**inputs).logits
        with attach(model, TempScale(0.5), backend="tiled", tile_rows=tile_rows) as run:
            assert close_model(run(**inputs).logits, wanted)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("inf"), float("nan")])
def test_wrong_temperatures_are_refused(tau: float) -> None:
    with pytest.raises(FieldError, match=r"TempScale\.tau = .*must be (above 0|a number)"):
        TempScale(tau)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_scores_and_weights_are_divided(tau: float) -> None:
    q, k, v, o, bias = (torch.randn(4, 3, 6), torch.randn(4, 3, 6), torch.randn(4, 3, 6), torch.randn(6, 4, 3),
                        torch.randn(4, 3))  # fmt: skip
    scores = torch.randn(1, 4, 5, 5)
    assert close_model(TempScale(tau).sharpen(scores, Bare().call), scores * (1 / tau))
    for own in (None, bias):
        found = TempScale(tau).folds(HeadWeights(q, k, v, o, own), Layer(0, 4, 4, 3, 3, 6))
        assert close_model(found.q, q * (1 / tau))
        assert found.k is k
        if own is None:
            assert found.q_bias is None
        else:
            assert close_model(found.q_bias, own * (1 / tau))


def test_it_is_idle_at_a_temperature_of_one() -> None:
    assert [TempScale(tau).idle(Bare().call) for tau in (0.5, 1.0, 2.0)] == [False, True, False]
