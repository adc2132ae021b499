"""A block that is replaced projects nothing that nobody reads."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from heedful import attach, models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call, Phase
from heedful.core.errors import RefusedModel, SiteError
from heedful.core.method import Method
from heedful.core.sites import Site, at

from .samples import PAPER

IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


class Halves(Method):
    """Gives half of what it is given."""

    paper = PAPER

    @at(Site.BLOCK)
    def half(self, x: Tensor, call: Call) -> Tensor:
        return x / 2


class Rests(Halves):
    """The same, but not in decode steps."""

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE


class Asks(Method):
    """Gives back its queries."""

    paper = PAPER

    @at(Site.BLOCK, before_rotary=True)
    def turn(self, x: Tensor, call: Call) -> Tensor:
        assert call.query is not None
        return call.query.transpose(1, 2).flatten(2)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Counter[nn.Module]:
    """How many rows each linear map was given; maps that were given none are not there."""
    found: Counter[nn.Module] = Counter()
    for kind in (nn.Linear, Conv1D):
        plain: Any = kind.forward

        def counted(self: nn.Module, x: Tensor, plain: Any = plain) -> Tensor:
            if n := x.shape[:-1].numel():
                found[self] += n
            return plain(self, x)

        monkeypatch.setattr(kind, "forward", counted)
    return found


def given(rows: Counter[nn.Module], layer: nn.Module) -> set[str]:
    return {name for name, module in layer.named_children() if rows[module]}


@torch.no_grad()
def test_no_projection_of_a_replaced_block_is_run(rows: Counter[nn.Module]) -> None:
    model = models.tiny("llama")
    first, second = (x.self_attn for x in model.model.layers)
    with attach(model, Halves().on(layers=0)) as run:
        for cached in (False, True):
            rows.clear()
            run(input_ids=IDS, use_cache=cached)
            assert given(rows, first) == set()
            assert given(rows, second) == set(QKVO)
            assert rows[second.q_proj] == IDS.numel()
    rows.clear()
    model(input_ids=IDS)
    assert given(rows, first) == set(QKVO), "the model is as it was"


@torch.no_grad()
def test_what_is_asked_for_is_projected(rows: Counter[nn.Module]) -> None:
    model = models.tiny("llama")
    with attach(model, Asks()) as run:
        run(input_ids=IDS)
    assert given(rows, model.model.layers[0].self_attn) == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("method", [Rests(), Halves().when("prefill")], ids=repr)
@torch.no_grad()
def test_keys_that_a_later_call_reads_are_projected(rows: Counter[nn.Module], method: Any) -> None:
    model = models.tiny("llama")
    layer = model.model.layers[0].self_attn
    with attach(model, method) as run:
        cache = cache_of(run(input_ids=IDS, use_cache=True))
        assert given(rows, layer) == {"k_proj", "v_proj"}
        run(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})
        assert given(rows, layer) == set(QKVO)
    model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})


@torch.no_grad()
def test_keys_behind_some_of_the_models_own_are_projected(rows: Counter[nn.Module]) -> None:
    """A cache that begins with the model's own keys goes on with them."""
    model = models.tiny("llama")
    cache = cache_of(model(input_ids=IDS, use_cache=True))
    rows.clear()
    with attach(model, Halves()) as run:
        run(input_ids=IDS[:, :2], use_cache=True, **{CACHE: cache})
    assert given(rows, model.model.layers[0].self_attn) == {"k_proj", "v_proj"}
    model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})


@torch.no_grad()
def test_a_cache_without_keys_serves_the_stack_that_made_it_alone() -> None:
    model = models.tiny("llama")
    with attach(model, Halves()) as run:
        whole = run(input_ids=IDS).logits
        out = run(input_ids=IDS[:, :5], use_cache=True)
        cache = cache_of(out)
        steps = [run(input_ids=IDS[:, i : i + 1], use_cache=True, **{CACHE: cache}).logits for i in (5, 6)]
        assert close_model(torch.cat([out.logits, *steps], 1), whole)
        assert cache.get_seq_length() == 7
    with pytest.raises(RefusedModel, match="holds no keys and values, since its block was replaced"):
        model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit", "t5", "whisper"])
@torch.no_grad()
def test_models_of_all_kinds_are_spared_it(rows: Counter[nn.Module], kind: str) -> None:
    model = models.tiny(kind)
    inputs, ends = models.tiny_inputs(model), ("EncDecAttention", "encoder_attn")
    with attach(model, Halves()) as run:
        names = run.layer_names
        if cross := [i for i, name in enumerate(names) if name.endswith(ends)]:
            with pytest.raises(SiteError, match="cross attention would ignore the other"):
                run(**inputs)
    own = [i for i in range(len(names)) if i not in cross]
    rows.clear()
    with attach(model, Halves().on(layers=own)) as run:
        spared = run(**inputs)[0]
    touched = {name for i in own for name, module in model.get_submodule(names[i]).named_modules() if rows[module]}
    assert not touched
    assert bool(spared.isfinite().all())


def test_gradients_flow_around_it() -> None:
    model = models.tiny("llama").train()
    with attach(model, Halves().on(layers=0)) as run:
        run(input_ids=IDS, labels=IDS).loss.backward()
    layers = model.model.layers
    assert layers[0].self_attn.q_proj.weight.grad is None or not layers[0].self_attn.q_proj.weight.grad.any()
    assert bool(layers[0].mlp.up_proj.weight.grad.any())
    assert bool(layers[1].self_attn.q_proj.weight.grad.any())
