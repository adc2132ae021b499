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
from heedful.core.call import Call
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.methods import FoPru, SinkRate
from heedful.tiny import tiny

from .interrupting import interrupted, ours
from .samples import PAPER, Gate, Scale


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


@torch.no_grad()
def test_what_was_remembered_of_an_encoder_that_generate_asked_before_is_known_behind_it() -> None:
    """It has the encoder look by itself, and calls the model with what came of that."""
    llava = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(llava, length=22, batch=2)
    roles = {"image": ((1, 17),), "patches": ((1, 17),)}
    asked = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    with attach(llava, FoPru(layer=0), roles=roles) as run:
        for _ in range(2):  # images are looked at anew
            wanted = run(**inputs).logits[:, -1]
            found = run.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **asked)
            assert close_model(found.logits[0], wanted)
            longer = torch.cat([inputs["input_ids"], found.sequences[:, 22:23]], 1)
            assert close_model(found.logits[1], run(**{**inputs, "input_ids": longer}).logits[:, -1])
        with run.paused():
            plain = llava(**inputs).logits[:, -1]
            looked = llava.get_image_features(inputs["pixel_values"], return_dict=True)
            text = {"input_ids": inputs["input_ids"] % 120}  # none stands for an image
            unseen = llava(**text).logits[:, -1]
        assert not close_model(plain, wanted)
        run(**inputs)  # what was chosen here is of no other look
        assert close_model(
            run(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": looked}).logits[:, -1], plain
        )
        llava.get_image_features(inputs["pixel_values"])  # nor of a text that has no image
        assert close_model(run(**text).logits[:, -1], unseen)


class Heard(Method):
    """Remembers how often an encoder attended, and tells it to cross-attention."""

    paper = PAPER

    @at(Site.PATTERN)
    def hear(self, weights: torch.Tensor, call: Call) -> torch.Tensor:
        kept = call.state.forward
        if not call.cross and not call.causal:
            kept["times"] = kept.get("times", 0) + 1
        return weights / (1 + kept.get("times", 0)) if call.cross else weights


@torch.no_grad()
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_was_remembered_of_a_text_is_known_to_a_decoder_that_writes_of_it(kind: str, copies: int) -> None:
    model = models.tiny(kind)
    ids = models.tiny_inputs(model)["input_ids"]
    asked = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3, "min_new_tokens": 3}
    with attach(model, Heard()) as run:  # generate repeats what an encoder made for each copy, as it does for beams
        for _ in range(2):
            written = run.generate(input_ids=ids, do_sample=copies > 1, num_return_sequences=copies, **asked)
        given = {"input_ids": ids.repeat_interleave(copies, 0), "decoder_input_ids": written.sequences[:, :-1]}
        wanted = run(**given).logits
    assert close_model(torch.stack(written.logits, 1), wanted)
    assert not close_model(wanted, model(**given).logits)


@torch.no_grad()
def test_of_several_looks_that_one_is_remembered_which_a_call_is_handed() -> None:
    llava = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(llava, length=22, batch=2)
    pixels, ids = inputs.pop("pixel_values"), inputs["input_ids"]
    roles = {"image": ((1, 17),), "patches": ((1, 17),)}
    with attach(llava, FoPru(layer=0), roles=roles) as run:
        wanted = [run(**inputs, pixel_values=x).logits for x in (pixels, pixels.flip(0))]
        looks = [llava.get_image_features(x, return_dict=True) for x in (pixels, pixels.flip(0))]
        for look, logits in zip(looks, wanted, strict=True):  # while both are held
            assert close_model(run(input_ids=ids, mm_encoder_outputs={"image": look}).logits, logits)
        assert not close_model(*wanted)
        looks = [llava.get_image_features(x, return_dict=True) for x in (pixels, pixels.flip(0))]
        copied = copy.deepcopy(looks[0])  # nobody can tell of which
        with pytest.raises(RefusedModel, match=r"looked more than once, and of each time FoPru\(.*cannot be told"):
            run(input_ids=ids, mm_encoder_outputs={"image": copied})
        run(input_ids=ids % 120)
        looks = [llava.get_image_features(pixels, return_dict=True)]
        copied = copy.deepcopy(looks[0])  # there is one that it may be
        assert close_model(run(input_ids=ids, mm_encoder_outputs={"image": copied}).logits, wanted[0])
