"""Yaad against its memory, token by token and head by head."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.mask import Padding
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import Yaad
from tests.by_hand import in_pieces

TEXT = torch.ones(2, 19, dtype=torch.bool)
TEXT[0, :4] = False


def _params(grad: bool = False) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"by_key": (2, 8, 3), "by_value": (2, 8, 3), "start": (2, 3)}
    found = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x.requires_grad_(grad) for name, x in found.items()}


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def _memories(k: Tensor, v: Tensor, p: dict[str, Tensor], g: int, sharp: float = 10.0) -> list[Tensor]:
    """The memory `[dv d]` of one head after each of these keys `[n d]`, and whether each went beyond the bound."""
    memory, found = torch.zeros(8, 8, dtype=k.dtype), []
    for key, value in zip(k, v, strict=True):
        key = _unit(key)
        stays, learns, bound = (p["by_key"][g].T @ key + p["by_value"][g].T @ value + p["start"][g]).unbind()
        error = memory @ key - value
        slope = error
        if error.square().sum().sqrt() > (1 + bound.exp()).log():
            slope = (1 + bound.exp()).log() * torch.tanh(sharp * error)
        memory = memory / (1 + (-stays).exp()) - torch.outer(slope, key) / (1 + (-learns).exp())
        found.append(memory)
    return found


@pytest.mark.parametrize("sharp", [10.0, 2.0])
def test_heads_read_what_was_learned_so_far(sharp: float) -> None:
    bare, p = Bare(dtype=torch.float64, text=TEXT), _params()
    found, _ = bare.run(Yaad(sharp), "reference", params=p)
    for b in range(2):
        start = 4 * (1 - b)
        for h in range(4):
            memories = _memories(bare.k[b, h // 2, start:], bare.v[b, h // 2, start:], p, h // 2, sharp)
            for i, memory in enumerate(memories, start):
                assert close(found[b, h, i], memory @ _unit(bare.q[b, h, i]))


def test_small_errors_are_learned_whole_and_large_ones_by_their_sign() -> None:
    p = _params()
    quiet = {**p, "by_key": p["by_key"] * 0, "by_value": p["by_value"] * 0}
    bare = Bare(dtype=torch.float64)
    for bound, far in ((50.0, False), (-3.0, True)):
        start = torch.tensor([[0.0, 0.0, bound]] * 2, dtype=torch.float64)
        found = bare.run(Yaad(), "reference", params={**quiet, "start": start})[0][:, :, 0]
        value = bare.v[:, :, 0].repeat_interleave(2, 1)
        learned = math.log(1 + math.exp(bound)) * torch.tanh(10 * value) if far else value
        query, key = bare.q[:, :, 0], bare.k[:, :, 0].repeat_interleave(2, 1)
        near = torch.nn.functional.cosine_similarity(query, key, dim=-1)
        assert close(found, 0.5 * near[..., None] * learned)


def test_the_first_steps_loss_and_gradient() -> None:
    bare, p = Bare(dtype=torch.float64, text=TEXT), _params(grad=True)
    leaves = [*p.values(), bare.q.requires_grad_(), bare.k.requires_grad_(), bare.v.requires_grad_()]
    loss = bare.run(Yaad(), "reference", params=p)[0].pow(2).sum()
    want = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        start = 4 * (1 - b)
        for h in range(4):
            memories = _memories(bare.k[b, h // 2, start:], bare.v[b, h // 2, start:], p, h // 2)
            for i, memory in enumerate(memories, start):
                want = want + (memory @ _unit(bare.q[b, h, i])).pow(2).sum()
    assert close(loss, want)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert bool(other.any())
        assert close(one, other, 4096)


def test_where_nothing_is_causal_all_read_what_all_came_to() -> None:
    bare, p = Bare(Shape(q=5), dtype=torch.float64, rules=()), _params()
    found, _ = bare.run(Yaad(), "reference", params=p)
    for h in range(4):
        memory = _memories(bare.k[0, h // 2], bare.v[0, h // 2], p, h // 2)[-1]
        assert close(found[0, h], bare.q[0, h] / bare.q[0, h].norm(dim=-1, keepdim=True) @ memory.T)


def test_padding_behind_and_within_a_text_changes_no_memory() -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, 7:9] = text[1, 12:] = False
    bare, p = Bare(Shape(q=5), dtype=torch.float64, rules=(Padding(text),)), _params()
    found, _ = bare.run(Yaad(), "reference", params=p)
    for b in range(2):
        for h in range(4):
            memory = _memories(bare.k[b, h // 2, text[b]], bare.v[b, h // 2, text[b]], p, h // 2)[-1]
            assert close(found[b, h], bare.q[b, h] / bare.q[b, h].norm(dim=-1, keepdim=True) @ memory.T)


def test_a_state_goes_on_and_is_made_anew_of_the_cache() -> None:
    bare, p = Bare(dtype=torch.float64, text=TEXT), _params()
    whole, _ = bare.run(Yaad(), "reference", params=p)
    state, found, alone = State(), [], []
    for first, stop in ((0, 6), (6, 7), (7, 19)):
        queries = Positions.row(first, stop - first)
        call = replace(bare.call, params=p, queries=queries, keys=Positions.row(0, stop), state=state)
        given = (bare.q[:, :, first:stop], bare.k[:, :, :stop], bare.v[:, :, :stop])
        found.append(Yaad().attend(given, call))
        alone.append(Yaad().attend(given, replace(call, state=State())))
    assert close(torch.cat(found, 2), whole)
    assert close(torch.cat(alone, 2), whole)
    assert state.cache["memory"].shape == (2, 2, 8, 8)


def test_what_was_read_is_not_learned_again() -> None:
    """Keys that the memory holds already may be anything."""
    bare, p, state = Bare(dtype=torch.float64), _params(), State()
    whole, _ = bare.run(Yaad(), "reference", params=p)
    k = bare.k.clone()
    for first, stop in ((0, 9), (9, 19)):
        call = replace(
            bare.call, params=p, queries=Positions.row(first, stop - first), keys=Positions.row(0, stop), state=state
        )
        found = Yaad().attend((bare.q[:, :, first:stop], k[:, :, :stop], bare.v[:, :, :stop]), call)
        assert close(found, whole[:, :, first:stop])
        k[:, :, :stop] = 1.0


def test_in_a_model_step_by_step_and_without_places() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, Yaad()) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        assert close_model(in_pieces(run, ids, (9, 1, 6))[0], whole)
        moved = torch.arange(16)[None] + 7
        assert close_model(run(input_ids=ids, position_ids=moved).logits, whole)


def test_the_start() -> None:
    found = Yaad().parameters(Layer(0, 4, 2, 8, 6, 32))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "by_key": (2, 8, 3),
        "by_value": (2, 6, 3),
        "start": (2, 3),
    }
    assert not bool(found["by_key"].any())
    assert not bool(found["by_value"].any())
    assert found["start"].tolist() == [[4.0, 0.0, 0.0]] * 2


def test_errors() -> None:
    for sharp in (0.0, float("inf")):
        with pytest.raises(FieldError, match=r"Yaad.sharp = .*: must be above 0"):
            Yaad(sharp)
