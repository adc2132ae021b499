"""PrefixGlobal against the paper's figure in loops: the pairs, their number, and the rules it is made of."""

from __future__ import annotations

import pytest
import torch

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.mask import Ahead, First, FirstQueries, Mask, Padding, Window
from heedful.core.positions import Pairs, Positions
from heedful.methods import PrefixGlobal


def sees(i: int, j: int, prefix: int, radius: int) -> bool:
    if i < prefix or j < prefix:
        return True
    return abs(i - j) <= radius


def table(n: int, prefix: int, radius: int) -> torch.Tensor:
    return torch.tensor([[sees(i, j, prefix, radius) for j in range(n)] for i in range(n)])


@pytest.mark.parametrize(("prefix", "radius"), [(3, 2), (0, 4), (5, 0), (1, 1), (30, 0), (0, 0)])
@pytest.mark.parametrize("pads", [(0, 0), (0, 4), (2, 5)])
def test_pairs_are_those_of_the_figure(prefix: int, radius: int, pads: tuple[int, int]) -> None:
    n = 17
    method, pad = PrefixGlobal(prefix, radius), torch.tensor(pads)
    places = Positions.row(0, n, pad=pad if any(pads) else None)
    text = torch.arange(n) >= pad[:, None]
    mask = method.narrow(Mask((Padding(text),)), Bare(Shape()).call)
    whole = slice(0, n)
    found = mask.keeps(Pairs(places, places, 1, whole, whole))
    assert found is not None
    rows = mask.key_ranges(places, places, 1)
    assert rows is not None, "kernels are told ranges of keys"
    rows = rows.expand(2, *rows.shape[1:])
    for row, skip in enumerate(pads):
        want = torch.zeros(n, n, dtype=torch.bool)
        want[skip:, skip:] = table(n - skip, prefix, radius)
        assert torch.equal(found[row, 0][skip:], want[skip:])
        for i in range(skip, n):
            told = {j for a, b in rows[row, 0, i].tolist() for j in range(a, b)}
            assert told == set(want[i].nonzero().flatten().tolist())
    for start, stop in ((0, 4), (4, 9), (9, 17), (16, 17)):
        part = places.take(slice(start, stop))
        seen = {j for a, b in mask.columns(part, places, slice(start, stop)) for j in range(a, b)}
        needed = found[:, 0, start:stop].any(1).any(0).nonzero().flatten().tolist()
        assert seen >= set(needed)
        if not any(pads):
            assert seen == set(needed), "no column is asked for in vain"


def test_an_encoder_computes_these_pairs_alone() -> None:
    model = models.tiny("bert", attn_implementation="eager")
    ids = torch.arange(3, 23)[None]

    for backend in ("reference", "tiled", "native"):
        with attach(model, PrefixGlobal(3, 2), backend=backend) as run, torch.no_grad():
            found = run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with torch.no_grad():
            mask = table(20, 3, 2)[None, None].float().log()
            want = model(input_ids=ids, attention_mask=mask).logits
        assert close(found, want)


def test_the_number_of_pairs_is_the_papers_and_grows_with_the_length() -> None:
    k, r = 3, 2
    for n in (20, 40, 80):
        kept = int(table(n, k, r).sum())
        assert kept <= 2 * k * n + (n - k) * (2 * r + 1)
    grown = [int(table(n, k, r).sum()) for n in (20, 40, 60)]
    assert grown[2] - grown[1] == grown[1] - grown[0] == 20 * (2 * k + 2 * r + 1)


def test_in_a_causal_model_it_is_sinks_and_a_window() -> None:
    for tokens in (4, 19, 30):
        causal = table(tokens, 3, 5).tril().sum() / tokens**2
        assert PrefixGlobal(3, 5).declares(tokens)["density"] == pytest.approx(float(causal))
    assert PrefixGlobal(3, 5).rests(9) is not None
    assert PrefixGlobal(3, 5).rests(10) is None
    assert "prefix=2, radius=2 would act" in str(PrefixGlobal().rests(9))


def test_first_queries_and_keys_ahead_are_rules_of_their_own() -> None:
    places = Positions.row(0, 6)
    pairs = Pairs(places, places, 1, slice(0, 6), slice(0, 6))
    assert Ahead(2).keeps(pairs)[0, 0].long().sum(-1).tolist() == [2, 3, 4, 5, 6, 6]
    assert FirstQueries(2).keeps(pairs)[0, 0].expand(6, 6).all(-1).tolist() == [True, True, *[False] * 4]
    later = places.take(slice(3, 5))
    assert Ahead(2).span(later, places) == ((0, 6),)
    assert Ahead(1).span(places.take(slice(0, 3)), places) == ((0, 3),)
    assert FirstQueries(3).span(later, places) == ()
    assert FirstQueries(4).span(later, places) == ((0, 6),)
    unknown = Positions(places.index, places.position)
    assert Ahead(2).span(unknown, places) is None
    assert FirstQueries(2).span(unknown, places) is None
    with pytest.raises(FieldError, match="must be 1 or more keys"):
        Ahead(0)
    with pytest.raises(FieldError, match="must be 0 or more queries"):
        FirstQueries(-1)
    assert (Window(1) & Ahead(1) | First(0)).span(later, places) is not None


def test_says_what_is_wrong_and_has_the_papers_numbers() -> None:
    assert (PrefixGlobal().prefix, PrefixGlobal().radius) == (512, 127)
    with pytest.raises(FieldError, match="prefix = -1: must be 0 or more"):
        PrefixGlobal(-1)
    with pytest.raises(FieldError, match="radius = -1: must be 0 or more"):
        PrefixGlobal(1, -1)
    assert PrefixGlobal.neutral().radius > 1 << 20
