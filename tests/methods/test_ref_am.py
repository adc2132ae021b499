"""RefAM: mean maps of the words that refer and are no sinks, in loops, in cross-attention and in joint attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.regions import PerText, Region
from heedful.core.stats import Cat
from heedful.methods import RefAM

from .painter import PLACES, Painter, inputs, maps

ROLES = {"marked": ((0, 2), (4, 5)), "other": ((3, 4),)}


def heat(mean: Tensor, words: list[int], sinks: float) -> tuple[Tensor, list[int]]:
    """Of one text's map `[q k]`; and the words that it is the mean of."""
    queries, keys = mean.shape
    kept = [k for k in words if min(float(mean[q, k]) for q in range(queries)) <= sinks / keys]
    return torch.stack([sum((mean[q, k] for k in kept), torch.zeros(()).double()) for q in range(queries)]) / max(
        1, len(kept)
    ), kept


@pytest.mark.parametrize("sinks", [1.0, 10.0])
@pytest.mark.parametrize("role", ["marked", "other"])
def test_the_mean_map_of_layers_and_words(sinks: float, role: str) -> None:
    model, method = Painter(), RefAM(role, sinks=sinks)
    words = [k for start, stop in ROLES[role] for k in range(start, stop)]
    with attach(model, method, roles=ROLES, inputs=inputs()) as run:
        for seed in (0, 1):
            run(**inputs(seed=seed))
        found = run[method]
    assert len(found) == 2
    for seed, one in enumerate(found):
        layers = maps(model, **inputs(seed=seed))
        for b in range(2):
            want = sum(heat(layer[b], words, sinks)[0] for layer in layers) / 2
            assert close(one[b].float(), want.float())
    assert found[0].shape == (2, PLACES)


def look(method: RefAM, pattern: Tensor, call: Call) -> Tensor:
    found = method.look(pattern, replace(call, forward=7))
    assert isinstance(found, Cat)
    assert list(found.tensors()) == ["000007"]
    return found.tensors()["000007"]


def crossed(keys: Tensor | None = None) -> Call:
    return replace(Bare(text=keys, rules=()).call, cross=True, roles={"marked": ((2, 5),), "places": ((9, 11), (6, 8))})


def drawn(n: int = 19) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return (2 * torch.randn(2, 4, n, n, generator=draw, dtype=torch.float64)).softmax(-1)


def test_a_word_that_everybody_looks_at_is_a_sink_and_is_left_out() -> None:
    pattern = drawn()
    pattern[:, :, :, 3] = 0.5  # 9.5 even shares
    pattern[1, :, 4, 3] = 0.1  # one token that does not give it much: in this text it is none
    for sinks, in_first in ((9.6, [2, 3, 4]), (9.5, [2, 3, 4]), (9.4, [2, 4])):
        found = look(RefAM(sinks=sinks), pattern, crossed())
        for b, words in enumerate((in_first, [2, 3, 4])):
            want, kept = heat(pattern[b].mean(0), [2, 3, 4], sinks)
            assert kept == words
            assert close(found[b], want)
    alone = look(RefAM(sinks=1.0), torch.full_like(pattern, 0.1), crossed())
    assert close(alone, torch.zeros(2, 19).double()), "nothing is left"


def test_padding_neither_looks_nor_counts() -> None:
    text = torch.arange(19)[None] >= torch.tensor([[0], [4]])
    pattern = drawn()
    pattern[1, :, :, 6] = 0.5  # 7.5 even shares of fifteen tokens
    pattern[1, :, :4, 6] = 0.0
    for sinks, words in ((7.6, [6, 7, 8]), (7.4, [7, 8])):
        found = look(RefAM(sinks=sinks), pattern, crossed(text))
        want, kept = heat(pattern[1, :, 4:, 4:].mean(0), [2, 3, 4], sinks)
        assert kept == [k - 4 for k in words]
        assert close(found[1, 4:], want)


def test_in_joint_attention_the_pictures_places_are_named() -> None:
    call = replace(crossed(), cross=False)
    found = look(RefAM(places="places"), drawn(), call)
    whole = look(RefAM(), drawn(), crossed())
    assert close(found, whole[:, [9, 10, 6, 7]])
    assert RefAM(places="places").look(drawn(), crossed()) is None
    assert RefAM().look(drawn(), call) is None


def test_each_text_has_its_own_padding_and_words() -> None:
    text = torch.arange(19)[None] >= torch.tensor([[0], [4]])
    words = PerText((Region(((2, 5),)), Region(((3, 4),))))
    call = replace(crossed(text), cross=False, roles={"marked": words, "places": ((9, 11), (6, 8))})
    pattern = drawn().requires_grad_(True)
    found = look(RefAM(places="places", sinks=100.0), pattern, call)
    assert not found.requires_grad
    for b, (pad, mine) in enumerate(((0, [2, 3, 4]), (4, [3]))):
        mean = pattern[b, :, pad:, pad:].detach().mean(0)
        assert close(found[b], torch.stack([mean[p, mine].mean() for p in (9, 10, 6, 7)]))


def test_what_stands_behind_a_prompt() -> None:
    assert RefAM().appended("the red square") == "the red square . a with"
    assert RefAM(magnets=("of",)).appended("it") == "it of"
    assert RefAM(magnets=()).appended("it") == "it"


def test_what_cannot_be() -> None:
    assert RefAM() == RefAM("marked", "", (".", "a", "with"), 10.0)
    assert RefAM(sinks=1.0).sinks == 1
    wrongs: list[dict[str, Any]] = [{"words": ""}, {"sinks": 0.9}, {"sinks": float("inf")}]
    for wrong in wrongs:
        with pytest.raises(FieldError, match=rf"RefAM\.{next(iter(wrong))} = "):
            RefAM(**wrong)
