"""FocusICL against batches attended to one by one and put together, and its filter row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.mask import Mask
from heedful.core.regions import PerText, Region, span_of
from heedful.methods import FocusICL

SPANS = ((1, 4), (4, 6), (6, 9), (10, 12), (12, 14))  # a word before them, one between, three behind
N = 17


def home(place: int, spans: tuple[tuple[int, int], ...] = SPANS) -> int:
    return next((n for n, (a, b) in enumerate(spans) if a <= place < b), -1)


def by_batches(scores: Tensor, v: Tensor, size: int, drop: float) -> Tensor:
    """Heads `[h n d]` from scores `[h n n]`: softmaxes over each batch and the question, put together by their sums."""
    batches = [list(range(i, min(i + size, len(SPANS)))) for i in range(0, len(SPANS), size)]
    out = torch.zeros(scores.shape[0], N, v.shape[-1], dtype=v.dtype)
    for h in range(len(scores)):
        for i in range(N):
            asked = [j for j in range(i + 1) if home(j) < 0]
            if home(i) >= 0:
                mine = next(b for b in batches if home(i) in b)
                sets = [asked + [j for j in range(i + 1) if home(j) in mine]]
            else:
                shown = [j for j in range(i + 1) if home(j) >= 0]
                gone = sorted(shown, key=lambda j: float(scores[h, i, j]))[: math.floor(drop * len(shown))]
                begun = [b for b in batches if SPANS[b[0]][0] <= i] or [[]]
                sets = [asked + [j for j in shown if home(j) in b and j not in gone] for b in begun]
            sums, given = [], []
            for keys in sets:
                powers = torch.stack([scores[h, i, j].exp() for j in keys])
                sums.append(powers.sum())
                given.append(sum(p * v[h, j] for p, j in zip(powers, keys, strict=True)) / powers.sum())
            total = sum(sums)
            out[h, i] = sum(s / total * g for s, g in zip(sums, given, strict=True))
    return out


@pytest.mark.parametrize(("size", "drop"), [(1, 0.0), (2, 0.0), (2, 0.3), (3, 0.55), (5, 0.2), (9, 0.9)])
def test_heads_are_those_of_the_batches_put_together(size: int, drop: float) -> None:
    bare = Bare(Shape(b=2, q=N, k=N), dtype=torch.float64)
    bare.call = replace(bare.call, roles={"demonstrations": SPANS})
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    scores = bare.q @ k.mT / bare.shape.d**0.5
    want = torch.stack([by_batches(scores[b], v[b], size, drop) for b in range(2)])
    for backend, rows in (("reference", None), ("tiled", 5), ("tiled", 1)):
        found = bare.run(FocusICL(drop, size), backend, *([] if rows is None else [rows]))[0]
        assert close(found, want)


def test_each_text_has_demonstrations_of_its_own() -> None:
    bare = Bare(Shape(b=2, q=N, k=N), dtype=torch.float64)
    other = SPANS[:2]
    bare.call = replace(bare.call, roles={"demonstrations": PerText((Region(SPANS), Region(other)))})
    both = bare.run(FocusICL(0.3, 1), "reference")[0]
    for row, spans in enumerate((SPANS, other)):
        bare.call = replace(bare.call, roles={"demonstrations": spans})
        assert close(both[row], bare.run(FocusICL(0.3, 1), "reference")[0][row])
    bare.call = replace(bare.call, roles={"demonstrations": PerText((Region(()), Region(())))})
    plain = bare.run(FocusICL(0.3, 1), "reference")[0]
    assert close(plain, bare.run(FocusICL.neutral(), "reference")[0])


@pytest.mark.filterwarnings("ignore:this run changed nothing")
def test_a_question_is_read_as_ever_where_one_batch_holds_all() -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (2, N))
    roles = {"demonstrations": SPANS}
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, FocusICL.neutral(), roles=roles) as run:
            assert close_model(run(input_ids=ids).logits, plain)
        with attach(model, FocusICL(0.0, 4), roles=roles) as run:
            changed = run(input_ids=ids).logits
        with attach(model, FocusICL(0.0, 5), roles=roles) as run:
            assert close_model(run(input_ids=ids).logits, plain)
    for drop, size, idle in ((0.0, 5, True), (0.0, 4, False), (0.1, 5, False)):
        call = replace(Bare(Shape()).call, roles=roles)
        assert FocusICL(drop, size).idle(call) == idle
    each = PerText((Region(SPANS), Region(SPANS[:2])))
    assert not FocusICL(0.0, 2).idle(replace(Bare(Shape()).call, roles={"demonstrations": each}))
    assert close_model(changed[:, :10], plain[:, :10])
    assert not close_model(changed[:, 14:], plain[:, 14:])


def test_batches_do_not_see_each_other_in_either_direction() -> None:
    bare = Bare(Shape(b=1, q=N, k=N))
    call = replace(bare.call, roles={"demonstrations": SPANS})
    whole = call.tile(slice(0, N), slice(0, N))
    keep = FocusICL(0.0, 2).part(Mask(), call).keeps(whole.pairs)
    for i in range(N):
        for j in range(N):
            apart = home(i) >= 0 and home(j) >= 0 and home(i) // 2 != home(j) // 2
            assert bool(keep[0, 0, i, j]) != apart


def test_spans_are_numbered_and_may_not_overlap() -> None:
    place = torch.arange(N)
    assert span_of(Region(SPANS), place).tolist() == [home(i) for i in range(N)]
    assert span_of(Region(SPANS[::-1]), place).tolist() == [4 - home(i) if home(i) >= 0 else -1 for i in range(N)]
    with pytest.raises(FieldError, match="must not overlap"):
        span_of(Region(((0, 3), (2, 4))), place)


def test_says_what_is_wrong() -> None:
    for drop in (-0.1, 1.0):
        with pytest.raises(FieldError, match="must be 0 or more, and below 1"):
            FocusICL(drop)
    with pytest.raises(FieldError, match="size = 0: must be 1 or more"):
        FocusICL(size=0)
    with pytest.raises(FieldError, match="must name a role"):
        FocusICL(role="")
    assert FocusICL() == FocusICL(0.1, 8, "demonstrations")
    with (
        pytest.raises(FieldError, match="no spans named 'demonstrations'"),
        attach(models.tiny("llama"), FocusICL()) as run,
    ):
        run(input_ids=torch.tensor([[5, 6]]))
