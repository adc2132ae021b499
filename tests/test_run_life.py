"""The life of a run: what may end it at any moment, and what must not outlive it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.adapters.hooked import Standing
from heedful.adapters.kvcache import HeldLayer, shrinking
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, RefusedModel
from heedful.methods import SinkRate
from heedful.tiny import tiny

from .interrupting import interrupted, ours
from .samples import Gate, Scale, Sharpness


class Own(nn.Module):
    """An attention layer that calls torch's kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama")


def hooking(frame: FrameType) -> bool:
    """What puts hooks into a model and takes them away, torch's part of it too."""
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    return file.endswith(("hooked.py", "resting.py")) or name.startswith("register_forward") or name == "undo"


def leaving(frame: FrameType) -> bool:
    """Heedful's, but for what undoes: an interrupt there comes before a thing is done again, or after."""
    return ours(frame) and frame.f_globals["__name__"] != "heedful.engine.resting"


def test_an_interrupt_in_close_leaves_nothing_that_closing_again_does_not_take(model: nn.Module) -> None:
    before, at, go_on = fingerprint(model), 0, True
    while go_on:
        run = attach(model, Scale() | Gate())
        go_on = interrupted(at, run.close)
        run.close()
        assert fingerprint(model) == before, at
        at += 1
    assert at > 20


def test_an_interrupt_as_a_with_ends_leaves_nothing(model: nn.Module) -> None:
    """Once it has begun to end: before its first line nobody could do anything."""
    before, at, go_on = fingerprint(model), 1, True
    while go_on:
        run = attach(model, Scale() | Gate())
        go_on = interrupted(at, lambda run=run: run.__exit__(None, None, None), leaving)
        assert fingerprint(model) == before, at
        at += 1
    assert at > 20


@pytest.mark.slow
def test_an_interrupt_in_attach_leaves_no_trace() -> None:
    model = tiny("llama", num_hidden_layers=1)
    before, at = fingerprint(model), 0
    while interrupted(at, lambda: attach(model, Gate())):
        assert fingerprint(model) == before, at
        at += 1
    assert at > 100


@pytest.mark.parametrize("through_torch", [False, True])
def test_an_interrupt_while_hooks_come_and_go_leaves_none(through_torch: bool) -> None:
    """Between a hook's coming and torch's handle for it, and in the tidying after a dry run."""
    model = nn.Sequential(Own()) if through_torch else tiny("llama", num_hidden_layers=1)
    inputs = torch.ones(1, 2, 4) if through_torch else None
    before, at = fingerprint(model), 0
    while interrupted(at, lambda: attach(model, Scale(), inputs=inputs), hooking):
        assert fingerprint(model) == before, at
        at += 1
    assert at > 50


def test_a_model_dropped_without_closing_is_freed() -> None:
    model = tiny("llama")
    attach(model, Scale())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_layer_number_below_zero_names_no_layer_of_a_cache() -> None:
    """Zamba2's shared attention says -1."""
    cache = DynamicCache()
    assert shrinking(cache, -1) is None
    cache.layers.append(HeldLayer())
    assert shrinking(cache, 0) is cache.layers[0]
    assert shrinking(cache, -1) is None


def test_a_failed_forward_counts_for_nothing() -> None:
    model = models.tiny("llama").eval()
    with attach(model, SinkRate()) as run, torch.no_grad():
        run(input_ids=IDS)
        before = run[SinkRate()]
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(input_ids=IDS)
        handle.remove()
        after = run[SinkRate()]
        assert repr(after) == repr(before)
        assert all(torch.equal(after.rate[n], before.rate[n]) for n in after.rate)
        run(input_ids=IDS)  # and the run goes on


def test_an_interrupt_in_a_forward_leaves_no_forward_open() -> None:
    model = models.tiny("llama").eval()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with attach(model, SinkRate()) as run, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(input_ids=IDS)
        handle.remove()
        first = run.state.now.number
        run(input_ids=IDS)
        assert run.state.now.number == first + 1, "the next one is a forward of its own"


@torch.no_grad()
def test_a_model_that_is_called_inside_its_own_forward_is_refused() -> None:
    model = models.tiny("llama").eval()

    def ask(*_: object) -> None:
        with pytest.raises(RefusedModel, match="is called again inside a forward of its own under this run"):
            run(input_ids=IDS[:, :5])

    with attach(model, Sharpness()) as run:
        wanted = run(input_ids=IDS, labels=IDS).loss
        handle = model.model.layers[0].register_forward_hook(ask)
        assert torch.equal(run(input_ids=IDS, labels=IDS).loss, wanted)  # and the one around it goes on
        handle.remove()


def test_what_is_attached_in_inference_learns_outside() -> None:
    model = models.tiny("llama").eval()
    with torch.inference_mode():
        run = attach(model, Gate())
        run(input_ids=IDS)
    run(input_ids=IDS, labels=IDS).loss.backward()
    assert all(x.grad is not None for x in run.parameters())
    run.close()


def test_one_run_is_for_one_thread_at_a_time() -> None:
    model = models.tiny("llama").eval()
    inside, go_on, told = threading.Event(), threading.Event(), []

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(10)

    with attach(model, SinkRate()) as run, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(wait)
        other = threading.Thread(target=lambda: told.append(run(input_ids=IDS).logits))
        other.start()
        inside.wait(10)
        with pytest.raises(FieldError, match="is under way in thread"):
            run(input_ids=IDS)
        go_on.set()
        other.join()
        handle.remove()
        assert close_model(told[0].detach(), run(input_ids=IDS).logits)


def test_a_paged_cache_is_refused() -> None:
    class PagedAttentionCache:
        """As continuous batching hands one over."""

    model = models.tiny("llama").eval()
    with attach(model, SinkRate()) as run, torch.no_grad():
        with pytest.raises(RefusedModel, match="continuous batching"):
            run(input_ids=IDS, cache=PagedAttentionCache())
        run(input_ids=IDS)


def test_continuous_batches_are_refused_with_the_reason_and_go_on_afterwards() -> None:
    model = models.tiny("llama").eval()
    how: dict[str, Any] = {
        "inputs": [[3, 4, 5, 6], [7, 8, 9]], "progress_bar": False,
        "generation_config": GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0),
    }  # fmt: skip
    before = set(vars(model))
    with attach(model, SinkRate()) as run:
        with pytest.raises(RefusedModel, match=r"LlamaForCausalLM .*pieces of many texts.*close the run first"):
            model.generate_batch(**how)
        copied = copy.deepcopy(model)
        assert run.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2
    assert set(vars(model)) == before
    assert not isinstance(vars(copied).get("init_continuous_batching"), Standing)
    assert all(len(found.generated_tokens) == 2 for found in model.generate_batch(**how).values())


def test_a_pause_inside_another_ends_with_the_outer_one(model: nn.Module) -> None:
    with torch.no_grad(), attach(model, Scale()) as run:
        acts = run(IDS).logits
        run.resume()
        with run.paused():
            plain = run(IDS).logits
            with run.paused():
                pass
            assert torch.equal(run(IDS).logits, plain)
            with pytest.raises(FieldError, match=r"resume\(\) first"):
                run.difference(IDS)
        assert torch.equal(run(IDS).logits, acts)
        with run.paused():
            run.close()
        assert torch.equal(model(IDS).logits, plain)


def test_a_difference_leaves_the_cache_as_it_was(model: nn.Module) -> None:
    """Both forwards go on from the same text."""
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS, **{CACHE: cache})
    with attach(model, SinkRate(), backend="reference") as run:
        assert run.difference(IDS[:, :3], **{CACHE: cache}) < 1e-5
    assert cache.get_seq_length() == IDS.shape[1]
    with attach(model, Scale()) as run:
        assert run.difference(IDS[:, :3], **{CACHE: cache}) > 1e-3
        model(IDS, **{CACHE: (grown := DynamicCache())})
        with pytest.raises(FieldError, match=r"fill it under torch\.no_grad"):
            run.difference(IDS[:, :3], **{CACHE: grown})


@pytest.mark.parametrize("how", [lambda y: [y, y], lambda y: {"a": (None, y)}, lambda y: (y.long(), [y])])
def test_a_difference_is_of_the_first_numbers_wherever_they_are(how: Callable[[torch.Tensor], object]) -> None:
    own = Own()
    own.register_forward_hook(lambda module, args, output: how(output))
    with attach(nn.Sequential(own), Scale(3.0)) as run:
        assert run.difference(torch.randn(2, 5, 8)) == pytest.approx(2.0)
    own.register_forward_hook(lambda module, args, output: None if output is None else ["nothing"])
    with attach(nn.Sequential(own), Scale()) as run, pytest.raises(FieldError, match="gives no floating-point numbers"):
        run.difference(torch.randn(2, 5, 8))
