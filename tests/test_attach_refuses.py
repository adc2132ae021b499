"""What `attach` refuses before anything runs, and what it need not refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful import attach
from heedful.conformance.model_laws import fingerprint
from heedful.core.errors import FieldError, RefusedModel, SiteError
from heedful.core.method import as_stack
from heedful.engine.scopes import require_there
from heedful.tiny import tiny

from .samples import Scale

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama", attn_implementation="eager")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "magic"}, "must be one of auto, sdpa, native, triton, tiled, reference"),
        ({"tile_rows": 0}, "must be 1 or more, or None"),
        ({"only": "model.vision"}, "no served layer of LlamaForCausalLM lies there"),
    ],
)
def test_wrong_arguments_are_named(model: nn.Module, arguments: dict[str, object], message: str) -> None:
    before = fingerprint(model)
    with pytest.raises(FieldError, match=message):
        attach(model, Scale(), **arguments)  # type: ignore[arg-type]
    assert fingerprint(model) == before


def test_layers_beyond_the_model_are_named(model: nn.Module) -> None:
    with pytest.raises(FieldError, match="must be below 2, the layers served"):
        attach(model, Scale().on(layers=2))


def test_heads_that_a_layer_does_not_have_are_named_before_anything_runs(model: nn.Module) -> None:
    before = fingerprint(model)
    for part in (Scale().on(layers=[0, 1], heads=[0, 4]), Scale().on(heads=4)):
        with pytest.raises(
            FieldError, match=r"\.heads = 4: must be below 4, the heads of layer 0; for example heads=3"
        ):
            attach(model, part)
    assert fingerprint(model) == before
    with attach(model, Scale().on(layers=1, heads=3)) as run:
        assert run.difference(input_ids=IDS) > 0


class Hidden(nn.Module):
    """A map that shows neither its weight nor what it is made of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = [inner]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner[0](x)
        return found


def test_heads_of_layers_that_do_not_tell_are_named_by_the_call(model: Any) -> None:
    for layer in model.model.layers:
        for name in ("q_proj", "o_proj"):
            setattr(layer.self_attn, name, Hidden(getattr(layer.self_attn, name)))
    with pytest.raises(SiteError, match="heads must be below 4"), attach(model, Scale().on(heads=9)) as run:
        run(input_ids=IDS)


def test_a_head_that_some_layers_have_may_be_named_without_them() -> None:
    heads = {0: 2, 1: 8, 2: None}.__getitem__
    require_there(as_stack(Scale().on(heads=7)), 3, heads)
    require_there(as_stack(Scale().on(layers=[1, 2], heads=7)), 3, heads)  # of one only a call tells
    for part in (Scale().on(layers=[0, 1], heads=7), Scale().on(layers=1, heads=8)):
        with pytest.raises(FieldError, match="must be below"):
            require_there(as_stack(part), 3, heads)
    require_there(as_stack(Scale().on(heads=9)), 3, heads)
    with pytest.raises(FieldError, match="must be below 8, the heads of layer 1"):
        require_there(as_stack(Scale().on(heads=8)), 2, heads)


@pytest.mark.parametrize("call", [attach, heedful.diagnose, heedful.patterns], ids=lambda f: f.__name__)
def test_a_model_without_numbers_is_refused(call: Any) -> None:
    with torch.device("meta"):
        empty = type(tiny())(tiny().config)
    with pytest.raises(RefusedModel, match="LlamaForCausalLM lies on the meta device, where weights have shapes"):
        call(empty, Scale() if call is attach else IDS)


def test_weights_that_come_back_when_they_are_used_are_there(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(x.is_meta for x in model.parameters())
    with attach(model, Scale()) as run:
        assert run.difference(input_ids=IDS) > 0
    assert heedful.patterns(model, IDS[0])[1, 3].shape == (IDS.shape[1], IDS.shape[1])


def test_what_loading_gives_is_taken_as_its_model_is(model: nn.Module) -> None:
    loaded = heedful.models.Loaded(model, None, "tiny")
    with attach(loaded, Scale()) as run:
        assert run.model is model
        assert heedful.attached(loaded) is run
        assert run.difference(input_ids=IDS) > 0
    assert type(heedful.fold(loaded, heedful.methods.TempScale(0.5))) is type(model)
    assert type(heedful.operate(loaded, heedful.methods.PruneHeads(groups=((0, 0),)))) is type(model)
    with pytest.raises(FieldError, match=r"must be a model \(torch.nn.Module\) or what heedful.models.load\(\) gives"):
        attach("default", Scale())  # type: ignore[arg-type]
