"""What a run decides once for a layer and a phase holds for every call that looks it up, and for no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from benchmarks.speed.decoding import read, step
from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.core.call import Call
from heedful.core.errors import RefusedModel, UnknownArgument
from heedful.core.mask import Blocks, Causal, Mask
from heedful.core.method import Method, as_stack
from heedful.core.positions import Positions
from heedful.core.ragged import Ragged
from heedful.engine.backends import BACKENDS
from heedful.engine.needs import Needs
from heedful.methods import ACT, AdaKV, KNorm, RectifiedAttention, SinkRate, SinkWindow, TempScale
from heedful.tiny import tiny, tiny_inputs

IDS = torch.arange(3, 35).view(1, 32)
# what a backend may ask of a call of one query for each head: all of it is in `Needs.kind`, or in the steps
FACTS = {
    "softcap", "sink", "sink_learns", "sinks_by_row", "bias", "bias_learns", "dropout", "pattern", "gradients",
    "transformed", "tensors", "call", "call.queries", "call.queries.single", "call.queries.len", "call.mask",
    "call.mask.blocks", "call.keys", "call.keys.pads",
} | {f.name for f in fields(Needs) if f.name.endswith("steps")}  # fmt: skip
OF_STEPS = {"reweights", "adds", "weighed", "sums", "learned_sums", "whole_map"}


class Watched:
    """Stands for something, and knows what was asked of it."""

    def __init__(self, given: object, asked: set[str], name: str = "") -> None:
        self._given, self._asked, self._name = given, asked, name

    def __getattr__(self, name: str) -> Any:
        self._asked.add(self._name + name)
        found = getattr(self._given, name)
        return (
            Watched(found, self._asked, f"{self._name}{name}.") if isinstance(found, Call | Positions | Mask) else found
        )

    def __len__(self) -> int:
        self._asked.add(f"{self._name}len")
        return len(self._given)  # type: ignore[arg-type]


def needs_of(what: Method, **more: Any) -> Needs:
    """What a step of one text under a method needs."""
    call = Call(0, 1, "", 4, 2, Positions.row(5, 1), Positions.row(0, 6), 1.0, mask=Mask((Causal(),)))
    tensors = tuple(torch.zeros(1, h, n, 8) for h, n in ((4, 1), (2, 6), (2, 6)))
    return Needs.of(as_stack(what).steps(), call=call, tensors=tensors, **more)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_backend_asks_for_more_than_the_kind_of_a_step(name: str) -> None:
    asked: set[str] = set()
    for what in (SinkWindow(), SinkRate(), ACT.example(), TempScale(2.0), RectifiedAttention(), KNorm()):
        for more in ({}, {"sink": True}, {"bias": True, "softcap": True}, {"pattern": True}):
            needs = needs_of(what, **more)
            assert needs.kind is not None
            BACKENDS[name].refuses(Watched(needs, asked))  # type: ignore[arg-type]
    assert asked <= FACTS | OF_STEPS, "add it to Needs.kind, or give None there"
    assert asked or name == "reference"


def kinds() -> Iterator[Needs]:
    plain = needs_of(KNorm())
    q, k, v = plain.tensors
    yield plain
    for name in ("softcap", "sink", "sink_learns", "sinks_by_row", "bias", "bias_learns", "dropout", "pattern"):
        yield replace(plain, **{name: True})
    yield replace(plain, tensors=tuple(x.bfloat16() for x in plain.tensors))
    yield replace(plain, tensors=(q, k.bfloat16(), v))
    yield replace(plain, tensors=tuple(x.to("meta") for x in plain.tensors))
    yield replace(plain, tensors=tuple(x[..., :4] for x in plain.tensors))
    yield replace(plain, tensors=(q, Ragged(torch.zeros(9, 8), (1, 2), [6, 3]), v))
    assert plain.call is not None
    yield replace(plain, call=replace(plain.call, keys=replace(plain.call.keys, pads=None)))


def test_calls_that_backends_tell_apart_are_of_unlike_kinds() -> None:
    found = [needs.kind for needs in kinds()]
    assert None not in found
    assert len(set(found)) == len(found)
    learned = needs_of(KNorm()).tensors[0].requires_grad_()
    assert replace(needs_of(KNorm()), learned=(learned,)).kind is None
    plain, traced = needs_of(KNorm()), list[object]()
    assert plain.call is not None
    blocks = Mask((Blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), 32),))
    assert replace(plain, call=replace(plain.call, mask=blocks)).kind is None
    assert replace(plain, call=replace(plain.call, queries=Positions.row(4, 2))).kind is None
    torch.func.vmap(lambda q: (traced.append(replace(plain, tensors=(q,)).kind), q)[1])(plain.tensors[0])
    assert traced == [None]


@torch.no_grad()
def test_each_step_of_a_run_has_the_backend_that_can_serve_it() -> None:
    model = tiny("llama", num_hidden_layers=2, attn_implementation="eager")
    with attach(model, KNorm(0.5)) as run:
        cache, backends = read(model, IDS), run.state.backends
        for _ in range(2):
            step(model, cache, IDS[:, :1])
            assert backends[0] == "sdpa"
            run(input_ids=IDS[:, :1], output_attentions=True, **{CACHE: cache})
            assert backends[0] == "reference"
    with attach(model, AdaKV(8, window=2, kernel=3)) as run:
        cache, found = read(model, IDS[:, :4]), []
        for i in range(4, 14):
            even = cache.layers[0].even
            step(model, cache, IDS[:, i : i + 1])
            found.append(even)
            assert (run.state.backends[0] == "sdpa") is even
        assert True in found
        assert False in found


def test_cross_attention_lets_nobody_go_on_from_heads_of_unlike_length() -> None:
    model = tiny("t5")
    given = tiny_inputs(model, batch=1)
    first, rest = given["decoder_input_ids"][:, :9], given["decoder_input_ids"][:, 9:10]
    with attach(model, AdaKV(6, window=2, kernel=3).on(layers=[2, 4])), torch.no_grad():
        cache = model(**{**given, "decoder_input_ids": first}, use_cache=True)[CACHE]
    assert not all(layer.even for layer in cache.self_attention_cache.layers)
    with pytest.raises(RefusedModel, match="unlike numbers of entries"):
        model(**{**given, "decoder_input_ids": rest}, **{CACHE: cache})


@torch.no_grad()
def test_a_call_without_a_cache_remembers_none_of_a_call_that_failed() -> None:
    model = tiny("llama", num_hidden_layers=2)
    with attach(model, KNorm(0.5)) as run:
        cache = read(model, IDS)
        handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, cache, IDS[:, :1])
        handle.remove()
        assert run(input_ids=IDS[:, :5], use_cache=False).logits.shape[1] == 5


@torch.no_grad()
def test_a_bias_for_keys_by_number_is_laid_over_no_cache_with_dropped_entries() -> None:
    model = tiny("t5")
    given = tiny_inputs(model, batch=1)
    with attach(model, KNorm(0.5).on(layers=[2])) as run:
        cache = run(**given, use_cache=True)[CACHE]
        with pytest.raises(UnknownArgument, match=r"T5Attention.* a bias for keys by their number"):
            run(**{**given, "decoder_input_ids": IDS[:, :1]}, **{CACHE: cache})


@torch.no_grad()
def test_each_layer_s_largest_call_is_kept_until_it_is_forgotten() -> None:
    model = tiny("llama", num_hidden_layers=2)
    with attach(model, TempScale(2.0)) as run:
        cache, calls = read(model, IDS), run.state.calls
        step(model, cache, IDS[:, :1])
        assert [len(calls[layer].queries) for layer in (0, 1)] == [32, 32]
        calls.clear()
        step(model, cache, IDS[:, :1])
        assert [len(calls[layer].queries) for layer in (0, 1)] == [1, 1]
