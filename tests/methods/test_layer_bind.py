"""LayerBind: who sees whom in loops over rows and keys, while it binds and afterwards, in joint attention and cross."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.call import Call, DenoisingStep
from heedful.core.errors import FieldError
from heedful.core.regions import PerText, Region
from heedful.methods import LayerBind

from .painter import HEADS, WIDTH, Cross, Painter, inputs

N = 19
WORDS = {"back words": (1, 2), "front words": (4,)}  # of a prompt of the first six tokens
PLACES = {"back": (7, 8, 9, 10), "front": (10, 11, 12)}
PROMPT = range(6)


def spans(tokens: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((i, i + 1) for i in tokens)


ROLES = {name: spans(tokens) for name, tokens in (WORDS | PLACES).items()} | {"prompt": ((0, 6),)}


def call(step: int | None, layer: int = 0, cross: bool = False, text: Tensor | None = None) -> Call:
    denoising = None if step is None else DenoisingStep(step, 10)
    bare = Bare(text=text, rules=(), depth=4).call
    return replace(bare, layer=layer, roles=ROLES, denoising=denoising, cross=cross)


def maps(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, 4, N, N, generator=draw, dtype=torch.float64)).softmax(-1)


def alone(row: Tensor, keys: list[int]) -> Tensor:
    total = sum(float(row[k]) for k in keys)
    return torch.tensor([float(row[k]) / total if k in keys else 0.0 for k in range(N)], dtype=row.dtype)


def binding(row: Tensor, i: int, cross: bool, hard: bool) -> Tensor:
    """While it binds a place is the nearest thing's."""
    named = [k for each in WORDS.values() for k in each]
    back = [i for i in PLACES["back"] if i not in PLACES["front"]]
    if i in PLACES["front"]:
        own, words = list(PLACES["front"]), list(WORDS["front words"])
    elif i in back:
        own, words = back, list(WORDS["back words"])
    elif i in PROMPT and not cross:
        return row
    else:
        return alone(row, [k for k in range(N) if k not in named])
    if cross:
        return alone(row, words)
    ground = [k for k in range(6, N) if k not in PLACES["back"] and k not in PLACES["front"]]
    return alone(row, words + own + ([] if hard else ground))


def nursing(row: Tensor, i: int, cross: bool, opacity: float) -> Tensor:
    """Afterwards each thing lies over those behind it, and shows as much of them as it is not opaque."""
    out = row
    for thing in ("back", "front"):
        if i in PLACES[thing]:
            local = alone(row, [*WORDS[f"{thing} words"], *([] if cross else range(6, N))])
            out = (1 - opacity) * out + opacity * local
    return out


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("step", "layer"), [(None, 0), (0, 0), (1, 3), (0, 2)])
def test_at_first_things_are_bound(step: int | None, layer: int, cross: bool) -> None:
    found = LayerBind(hard=(2, 5)).bind(maps(), call(step, layer, cross))
    for b in range(2):
        for h in range(4):
            for i in range(N):
                assert close(found[b, h, i], binding(maps()[b, h, i], i, cross, layer == 2)), (b, h, i)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("step", "opacity"), [(2, 0.7), (6, 0.4), (3, 1.0)])
def test_then_they_are_laid_upon_each_other(step: int, opacity: float, cross: bool) -> None:
    found = LayerBind(opacity=opacity, hard=(0,)).bind(maps(), call(step, cross=cross))
    for b in range(2):
        for h in range(4):
            for i in range(N):
                assert close(found[b, h, i], nursing(maps()[b, h, i], i, cross, opacity)), (b, h, i)


def test_a_row_that_sees_none_of_its_words_stays() -> None:
    pattern = maps()
    pattern[..., 4] = 0.0
    found = LayerBind().bind(pattern, call(0, cross=True))
    assert close(found[:, :, 10:13], pattern[:, :, 10:13])
    assert not close(found[:, :, 7:10], pattern[:, :, 7:10])


def test_roles_are_counted_from_where_a_text_begins_and_may_be_each_texts_own() -> None:
    text = torch.arange(N)[None] >= torch.tensor([[0], [4]])
    method, pattern = LayerBind(("front",), ("front words",), binding=0.0), maps()
    found = method.bind(pattern, call(3, text=text))
    assert (found != pattern).any(-1).any(1).nonzero().tolist() == [
        [b, 10 + 4 * b + i] for b in (0, 1) for i in (0, 1, 2)
    ]
    own = PerText((Region(((8, 9),)), Region(((12, 14),))))
    found = method.bind(pattern, replace(call(3), roles=ROLES | {"front": own}))
    assert (found != pattern).any(-1).any(1).nonzero().tolist() == [[0, 8], [1, 12], [1, 13]]


def test_in_a_model_of_places_and_words() -> None:
    model, given = Painter(), inputs()
    roles = {"back": ((0, 8),), "front": ((6, 12),), "back words": ((0, 2),), "front words": ((3, 5),)}
    x = given["x"]
    for layer in cast(Iterable[Cross], model.layers):
        q, k, v = (layer.heads(part) for part in (layer.q(x), layer.k(given["context"]), layer.v(given["context"])))
        scores = q @ k.mT / math.sqrt(WIDTH / HEADS)
        words = 6 * [[0, 1]] + 6 * [[3, 4]]
        heads = [scores[:, :, i : i + 1, each].softmax(-1) @ v[:, :, each] for i, each in enumerate(words)]
        x = x + torch.cat(heads, 2).transpose(1, 2).flatten(2)
    with attach(model, LayerBind(), roles=roles, inputs=given) as run:
        assert close(run(**given), x)
        with run.denoising(8, of=10):
            assert close(run(**given), model(**given))


def test_when_it_rests() -> None:
    method = LayerBind()
    assert [method.idle(call(step)) for step in (None, 0, 6, 7, 9)] == [False, False, False, True, True]
    assert [LayerBind(binding=0.8).idle(call(step)) for step in (7, 8)] == [False, True]
    assert LayerBind.neutral().idle(call(0))
    assert LayerBind.neutral().idle(call(None))


def test_what_cannot_be() -> None:
    assert LayerBind() == LayerBind(("back", "front"), ("back words", "front words"), "prompt", 0.2, 0.7, 0.7, ())
    assert LayerBind.example() == LayerBind(("documents", "answer"), ("bos", "marked"), binding=1.0)
    assert LayerBind(opacity=1.0, binding=0.0, until=1.0).until == 1
    for given in ((("a",), ("b", "c")), ((), ())):
        with pytest.raises(
            FieldError, match=rf"LayerBind\.words = .*as many roles as regions, {len(given[0])}, and one"
        ):
            LayerBind(*given)
    assert LayerBind(hard=(0,)).hard == (0,)
    with pytest.raises(FieldError, match=r"LayerBind\.hard = \(0, -1\): each must be 0 or more"):
        LayerBind(hard=(0, -1))
    for name in ("binding", "until", "opacity"):
        for wrong in (-0.1, 1.1):
            with pytest.raises(FieldError, match=rf"LayerBind\.{name} = .*: must lie from 0 to 1"):
                LayerBind(**{name: wrong})  # type: ignore[arg-type]
