"""In-Context Brush: shift and heads' factors in loops over rows, keys and heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.regions import PerText, Region
from heedful.methods import InContextBrush

N = 19
ROLES = {"target": ((9, 12), (15, 18)), "subject": ((4, 9),), "prompt": ((0, 3),)}
TARGET, SUBJECT, PROMPT = [9, 10, 11, 15, 16, 17], [4, 5, 6, 7, 8], [0, 1, 2]


def call(text: Tensor | None = None) -> Call:
    return replace(Bare(text=text, rules=()).call, roles=ROLES)


def maps(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, 4, N, N, generator=draw, dtype=torch.float64)).softmax(-1)


def by_hand(pattern: Tensor, shift: float, boost: float, begins: tuple[int, int] = (0, 0)) -> Tensor:
    out = pattern.clone()
    for b, begin in enumerate(begins):
        target, subject, prompt = ([i + begin for i in each if i + begin < N] for each in (TARGET, SUBJECT, PROMPT))
        looks = [sum(float(pattern[b, h, i, j]) for i in target for j in prompt) for h in range(4)]
        for h in range(4):
            eye = (looks[h] - min(looks)) / (max(looks) - min(looks))
            for i in range(N):
                for j in range(N):
                    more = 1 + shift if i in target and j in subject + prompt else 1
                    out[b, h, i, j] = pattern[b, h, i, j] * more * (1 + boost * eye)
    return out


@pytest.mark.parametrize(("shift", "boost"), [(0.3, 0.2), (0.0, 0.7), (1.5, 0.0)])
def test_the_pattern(shift: float, boost: float) -> None:
    found = InContextBrush(shift, boost).brush(maps(), call())
    assert close(found, by_hand(maps(), shift, boost))


def test_roles_are_counted_from_where_a_text_begins_and_may_be_each_texts_own() -> None:
    text = torch.arange(N)[None] >= torch.tensor([[0], [4]])
    assert close(InContextBrush().brush(maps(), call(text)), by_hand(maps(), 0.3, 0.2, (0, 4)))
    own = replace(call(), roles=ROLES | {"target": PerText((Region(((9, 12),)), Region(((15, 18),))))})
    found = InContextBrush(boost=0.0).brush(maps(), own)
    changed = (found != maps()).any(-1).any(1)
    assert changed.nonzero().tolist() == [[0, 9], [0, 10], [0, 11], [1, 15], [1, 16], [1, 17]]


def test_heads_that_look_alike_count_as_they_did() -> None:
    alike = maps()[:, :1].expand(-1, 4, -1, -1)
    assert close(InContextBrush(0.0, 5.0).brush(alike, call()), alike)
    faint = alike * torch.tensor([1.0, 0.5, 0.5, 0.75], dtype=alike.dtype)[:, None, None]
    wanted = faint * torch.tensor([3.0, 1.0, 1.0, 2.0], dtype=alike.dtype)[:, None, None]
    assert close(InContextBrush(0.0, 2.0).brush(faint, call()), wanted)


def test_the_least_of_looks_are_no_reason_to_strengthen_a_head() -> None:
    faint = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64) * torch.finfo(torch.float64).eps
    pattern = maps()[:1]
    for i in TARGET:
        pattern[..., i, PROMPT] = faint[None, :, None] / (len(TARGET) * len(PROMPT))
    factors = InContextBrush(0.0, 1.0).brush(pattern, call())[0, :, 0, 10] / pattern[0, :, 0, 10]
    assert close(factors, torch.tensor([1.0, 1.2, 1.4, 1.8], dtype=torch.float64))  # the range is 4 eps, beside another


def test_when_it_rests() -> None:
    assert InContextBrush.neutral().idle(call())
    assert not InContextBrush(0.0).idle(call())
    assert not InContextBrush(boost=0.0).idle(call())
    assert InContextBrush().idle(replace(call(), cross=True))


def test_what_cannot_be() -> None:
    assert InContextBrush() == InContextBrush(0.3, 0.2, "target", "subject", "prompt")
    assert InContextBrush.example() == InContextBrush(1.0, 1.0, "answer", "marked", "bos")
    for name in ("shift", "boost"):
        for wrong in (-0.1, float("inf")):
            with pytest.raises(FieldError, match=rf"InContextBrush\.{name} = .*: must be 0 or more"):
                InContextBrush(**{name: wrong})
    for name in ("target", "subject", "prompt"):
        with pytest.raises(FieldError, match=rf"InContextBrush\.{name} = '': must name a role"):
            InContextBrush(**{name: ""})  # type: ignore[arg-type]
