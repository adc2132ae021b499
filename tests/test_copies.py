"""Models that share their config with an attached one, and copies of an attached one: each is what it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from heedful import attach, load, models
from heedful.adapters.bound import StandIn
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import close_model
from heedful.core.errors import NotEntered
from heedful.core.method import as_stack

from .samples import Gate, Scale

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "attention_mask": torch.ones(2, 12).index_fill(1, torch.arange(3), 0)}
how = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=IDS).logits, model(**PADDED).logits])


def edited(model: Any, by: float) -> Tensor:
    with attach(model, Scale(by)) as run:
        return logits(run)


def twins(implementation: str) -> tuple[Any, Any]:
    config = copy.deepcopy(models.tiny("llama").config)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert first.config is second.config
    return first, second


@how
def test_a_model_beside_an_attached_one_of_the_same_config_is_left_alone(implementation: str) -> None:
    first, second = twins(implementation)
    plain = logits(second)
    with attach(first, Scale()) as run:
        assert torch.equal(logits(second), plain)
        assert torch.equal(second.generate(input_ids=IDS, max_new_tokens=4), plain_tokens(second))
        late = LlamaForCausalLM(first.config).eval()
        late.load_state_dict(second.state_dict())
        assert torch.equal(logits(late), plain)
        assert not torch.equal(logits(run), logits(second))
    assert torch.equal(logits(late), plain)
    assert first.config._attn_implementation_internal == implementation


def plain_tokens(model: Any) -> Tensor:
    return copy.deepcopy(model).generate(input_ids=IDS, max_new_tokens=4)


@how
@pytest.mark.parametrize("first_out", [True, False])
def test_two_models_of_one_config_are_edited_apart_and_close_in_any_order(implementation: str, first_out: bool) -> None:
    first, second = twins(implementation)
    before = [fingerprint(m) for m in (first, second)]
    plain, wanted = [logits(m) for m in (first, second)], [edited(first, 2.0), edited(second, 3.0)]
    runs = [attach(first, Scale(2.0)), attach(second, Scale(3.0))]
    assert all(torch.equal(logits(run), want) for run, want in zip(runs, wanted, strict=True))
    out, left = (0, 1) if first_out else (1, 0)
    runs[out].close()
    assert torch.equal(logits((first, second)[out]), plain[out])
    assert torch.equal(logits(runs[left]), wanted[left])
    runs[left].close()
    assert [fingerprint(m) for m in (first, second)] == before
    assert first.config._attn_implementation_internal is not None
    assert type(first.config._attn_implementation_internal) is str


def test_an_attached_model_that_was_dropped_leaves_its_config_to_the_others() -> None:
    first, second = twins("sdpa")
    plain, wanted = logits(second), edited(second, 3.0)
    attach(first, Scale())
    del first
    gc.collect()
    assert torch.equal(logits(second), plain)
    assert torch.equal(edited(second, 3.0), wanted)
    assert type(second.config._attn_implementation_internal) is str


def test_a_name_given_since_stays() -> None:
    model = models.tiny("llama").eval()
    with attach(model, Scale()):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_an_attention_module_that_came_in_since_is_noticed() -> None:
    model = models.tiny("llama").eval()
    with attach(model, Scale()) as run:
        other = type(model.model.layers[1].self_attn)(model.config, 1)
        model.model.layers[1].self_attn = other
        with pytest.raises(NotEntered, match="was it put into the model since"):
            logits(run)


def through_a_file(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file]


@how
@pytest.mark.parametrize("twin_of", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_an_attached_model_is_the_plain_model(twin_of: Any, implementation: str) -> None:
    model = twins(implementation)[0]
    plain, wanted = logits(model), edited(model, 2.0)
    with attach(model, Scale(2.0)) as run:
        twin = twin_of(model)
        assert type(twin.config._attn_implementation_internal) is str
        assert torch.equal(logits(twin), plain)
        assert not run.state.entered, "nothing of the copy comes to the run"
        assert torch.equal(edited(twin, 2.0), wanted)
        assert torch.equal(logits(run), wanted)
    assert torch.equal(logits(twin), plain)


@pytest.mark.parametrize("twin_of", COPIES[:2], ids=["deepcopy", "pickle"])
def test_a_copy_is_saved_with_what_is_attached_to_it(twin_of: Any, tmp_path: Path) -> None:
    model = models.tiny("llama").eval()
    with attach(model, Scale(2.0)):
        twin = twin_of(model)
    with attach(twin, Scale(3.0)) as run:
        twin.save_pretrained(tmp_path)
        wanted = logits(run)
    with load(tmp_path) as run:
        assert run.stack == as_stack(Scale(3.0))
        assert torch.equal(logits(run), wanted)


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("twin_of", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_an_attached_model_is_saved_as_the_plain_model(twin_of: Any, closed: bool, tmp_path: Path) -> None:
    model = models.tiny("llama").eval()
    plain = logits(model)
    with attach(model, Scale(2.0)) as run:
        twin = twin_of(model)
        if closed:
            run.close()
        twin.save_pretrained(tmp_path)
    found = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(found), plain)
    assert not hasattr(twin.config, "heedful")
    assert not hasattr(found.config, "heedful")


def test_a_copy_keeps_a_way_to_save_of_its_own(tmp_path: Path) -> None:
    model, calls = models.tiny("llama").eval(), []

    def own(folder: Any) -> None:
        calls.append(folder)

    model.save_pretrained = own
    with attach(model, Scale(2.0)):
        twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert calls == [tmp_path]


def test_a_copy_of_an_attached_model_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    model = models.tiny("llama").eval()
    plain = logits(model)
    with attach(model, Scale()):
        twin = copy.deepcopy(model)
    assert close_model(logits(torch.compile(twin, backend="eager", fullgraph=True)), plain)
    torch.compiler.reset()


def test_a_copy_takes_learned_parameters_along() -> None:
    model = models.tiny("llama").eval()
    with attach(model, Gate()) as run:
        for p in run.parameters():
            p.data.mul_(0.5)
        wanted = logits(run)
        twin = copy.deepcopy(model)
    with attach(twin, Gate()) as run:
        assert torch.equal(logits(run), wanted)


@pytest.mark.parametrize("native", ["sdpa", None])
def test_what_stands_for_a_name_is_copied_as_that_name(native: str | None) -> None:
    name = StandIn("heedful", native)
    assert name == "heedful"
    assert hash(name) == hash("heedful")
    for twin in (copy.copy(name), copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert twin == native
        assert type(twin) is type(native)
