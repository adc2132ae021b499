"""Values: methods, stacks, masks, papers, prompts, fitted tensors; and every error they raise."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful import Method, Prompt, Site, Stack
from heedful.authoring import Fitted, at
from heedful.catalogue import entries
from heedful.core import errors
from heedful.core.call import Call, Phase
from heedful.core.column_ranges import intersection, union
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import CatalogueError, ClashError, DefinitionError, FieldError, HeedfulError, nearest
from heedful.core.mask import Causal, First, Mask, Rule, Where, Window
from heedful.core.paper import Paper
from heedful.core.positions import Pairs, Positions
from heedful.core.sites import HEADLESS_SITES, reads
from heedful.core.stats import Sum

from .samples import PAPER, Narrow, Scale, Shares, Zero

OTHER = Paper("k2", "Another One", "Bo Other", 2020, "2001.00001")


class Mixer(Method):
    """Replaces the map."""

    paper = PAPER

    @at(Site.MIX)
    def mix(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        return torch.zeros_like(qkv[0])


class Other(Mixer):
    paper = PAPER


class Alone(Scale):
    """Cannot stand Zero."""

    paper = PAPER
    forbids: ClassVar[dict[str, str]] = {"Zero": "there is nothing left to scale"}


def test_methods_are_values() -> None:
    assert Scale(3.0) == Scale(by=3.0)
    assert hash(Scale(3.0)) == hash(Scale(3.0))
    assert repr(Scale()) == "Scale(by=2.0)"
    with pytest.raises(AttributeError):
        Scale().by = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (Scale(by=np.float32(0.5)), Scale(by=0.5)),  # type: ignore[arg-type]
        (Scale(by=Fraction(1, 2)), Scale(by=0.5)),  # type: ignore[arg-type]
        (Scale(by=np.int64(3)), Scale(by=3)),  # type: ignore[arg-type]
        (Narrow(size=np.int64(4)), Narrow(size=4)),  # type: ignore[arg-type]
        (Zero().on(layers=np.arange(2), heads=torch.tensor(1)), Zero().on(layers=[0, 1], heads=1)),  # type: ignore[arg-type]
        (Zero().on(layers=[np.int64(1)]), Zero().on(layers=1)),
    ],
)
def test_numbers_of_other_libraries_become_plain_ones(given: Any, plain: Any) -> None:
    assert repr(given) == repr(plain)  # as files hold it


def test_stacks_print_hash_and_order() -> None:
    stack = Scale() | Zero().on(layers=1) | Narrow().when("prefill")
    assert repr(stack) == "Scale(by=2.0) | Zero().on(layers=[1]) | Narrow(size=4).when('prefill')"
    assert stack == Stack((Scale(), Zero().on(layers=1), Narrow().when("prefill")))
    assert len({stack, Scale() | Zero().on(layers=1) | Narrow().when("prefill")}) == 1
    assert [s.edit.site for s in stack.steps()] == [Site.MASK, Site.PATTERN, Site.HEAD_OUTPUT]
    assert [s.number for s in stack.steps(layer=0)] == [2, 0]
    assert [s.number for s in stack.steps(layer=1, phase=Phase.DECODE)] == [1, 0]
    assert (Scale() | (Zero() | Narrow())) == ((Scale() | Zero()) | Narrow())
    assert stack.cite().count("@article") == 1


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (lambda: Mixer() | Other(), "both replace MIX"),
        (lambda: Mixer() | Zero(), "there is no PATTERN for Zero"),
        (lambda: Shares() | Mixer(), "there is no PATTERN for Shares"),
        (lambda: Narrow() | Mixer(), "has none to mask"),
        (lambda: Alone() | Zero(), "nothing left to scale"),
        (lambda: Zero() | Alone(), "nothing left to scale"),
    ],
)
def test_clashes_are_raised_where_methods_join(join: object, reason: str) -> None:
    with pytest.raises(ClashError, match=reason):
        join()  # type: ignore[operator]


def test_methods_that_never_meet_do_not_clash() -> None:
    assert len(Mixer().on(layers=0) | Other().on(layers=1)) == 2
    assert len(Mixer().when("prefill") | Other().when("decode")) == 2


def test_wrong_methods_are_refused_when_defined() -> None:
    with pytest.raises(DefinitionError, match="Empty edits no site"):
        type("Empty", (Method,), {"paper": PAPER})
    with pytest.raises(DefinitionError, match="Lost has no paper"):
        type("Lost", (Method,), {"f": at(Site.KEY)(lambda self, x, call: x)})
    body = {"paper": PAPER, "kind": "image", "__annotations__": {"kind": "str"}}
    with pytest.raises(DefinitionError, match="Named has a field named kind"):
        type("Named", (Method,), {**body, "f": at(Site.KEY)(lambda self, x, call: x)})
    for name in ("when", "answer", "fit"):
        body = {"paper": PAPER, name: "now", "__annotations__": {name: "str"}}
        with pytest.raises(DefinitionError, match=f"Named has a field named {name}, which says something else"):
            type("Named", (Method,), {**body, "f": at(Site.KEY)(lambda self, x, call: x)})
    with pytest.raises(DefinitionError, match="Named has a marked function named answer"):
        type("Named", (Method,), {"paper": PAPER, "answer": at(Site.KEY)(lambda self, x, call: x)})
    edit = lambda self, x, call: x  # noqa: E731 - a marked function needs its own object
    body = {n: at(s)(type(edit)(edit.__code__, {}, n)) for n, s in (("a", Site.KEY), ("b", Site.KEY))}
    with pytest.raises(DefinitionError, match="marks one site twice"):
        type("Twice", (Method,), {"paper": PAPER, **body})
    body = {"a": at(Site.KEY, when="nothing")(type(edit)(edit.__code__, {}, "a"))}
    with pytest.raises(DefinitionError, match="when='nothing' names no field"):
        type("Odd", (Method,), {"paper": PAPER, **body})


@pytest.mark.parametrize("kind", entries().values(), ids=lambda kind: kind.__name__)
def test_what_cannot_be_for_some_heads_says_so(kind: type[CatalogueEntry]) -> None:
    """A method that acts on tokens and not on heads, and what is no method, refuse `.on(heads=...)` in words."""
    made = kind.example()
    if not isinstance(made, Method):
        for restrict in (made.on, made.when):
            with pytest.raises(
                DefinitionError, match=r"\(\): it goes to heedful\.\w+\(\), and methods alone act in some"
            ):
                restrict(0)
    elif {edit.site for edit in made.edits} & (HEADLESS_SITES | {Site.MIX}):
        with pytest.raises(FieldError, match=r"heads = \(0,\): it acts at \w+, which has no head axis; leave them out"):
            made.on(heads=0)


def test_stacks_hold_methods_only() -> None:
    with pytest.raises(DefinitionError, match="not the class Scale"):
        Scale() | Scale  # type: ignore[operator]
    with pytest.raises(DefinitionError, match="not 3"):
        Stack((3,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale().on(layers=[]), r"Scale.on\(\).layers = \[\]: must be one or more numbers"),
        (lambda: Scale().on(heads=-1), r"Scale.on\(\).heads = -1"),
        (lambda: Scale().on(layers=np.array([True, False])), r"Scale.on\(\).layers"),
        (lambda: Scale().on(layers=torch.tensor([0.0, 1.0])), r"Scale.on\(\).layers"),  # type: ignore[arg-type]
        (lambda: Mixer().on(heads=0), "it acts at MIX, which has no head axis; leave them out"),
        (lambda: Scale().when("later"), r"must be 'prefill' or 'decode'; for example phase='prefill'"),
        (lambda: Scale(by=math.inf), "Scale.by = inf: must be finite"),
        (lambda: Narrow(size=int), "Narrow.size = <class 'int'>: must be int"),  # type: ignore[arg-type]
        (lambda: Narrow(size=np.array([1, 2])), "Narrow.size = a ndarray .*: must be int"),  # type: ignore[arg-type]
        (lambda: Window(0), "Window.size = 0: must be 1 or more keys"),
        (lambda: First(-1), "First.count = -1"),
        (lambda: Paper("k", "", "a", 2020), "Paper.title = ''"),
        (lambda: Paper("k", "t", "a", 20), "Paper.year = 20: must be a year"),
        (lambda: Paper("k", "t", "a", 2020, differs="no"), "must be a tuple of sentences"),  # type: ignore[arg-type]
        (lambda: Paper("k", "t", "a", 2020, also=OTHER), "must be a tuple of papers that name no others"),  # type: ignore[arg-type]
        (lambda: Paper("k", "t", "a", 2020, also=("k2",)), "must be a tuple of papers"),  # type: ignore[arg-type]
        (lambda: Paper("k", "t", "a", 2020, also=(replace(OTHER, also=(OTHER,)),)), "that name no others"),
        (lambda: Prompt((1, 2), {"a": ((0, 3),)}), "a span lies within the 2 tokens"),
        (lambda: Prompt((1, 2)).spans("a"), "has no spans named 'a'"),
        (lambda: Prompt((1, 2)).only((1, 0)), "must be numbers of some of the 2 tokens, in their order"),
        (lambda: Prompt((1, 2)).only((1, 1)), "in their order"),
        (lambda: Prompt((1, 2)).only(()), "in their order"),
        (lambda: Prompt((1, 2)).only((1, 2)), "in their order"),
        (lambda: Prompt((1, 2)).only((-1, 0)), "in their order"),
        (lambda: Prompt((1, 2)).inserted(3, Prompt((5,))), "must be a place from 0 to 2"),
        (lambda: Prompt((1, 2)).inserted(-1, Prompt((5,))), "must be a place from 0 to 2"),
        (lambda: Prompt((1, 2)).piece(1, 3), "in their order"),
        (lambda: Prompt((1, 2), {"a": ((0, 1),)}).reordered("a", (1,)), "must name each of 1 spans once"),
    ],
)
def test_wrong_values_name_field_value_rule_and_a_good_value(make: object, message: str) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "for example" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_drawn_error_tree_is_the_tree() -> None:
    drawn = [line.strip("│├└─ ").split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    real = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, HeedfulError)}
    assert set(drawn) | {"HeedfulError"} == real


def test_near_names_are_offered() -> None:
    assert nearest("sinkwindo", ["SinkWindow", "ACT"]) == " Did you mean SinkWindow?"
    assert nearest("zzz", ["SinkWindow"]) == nearest("", ["SinkWindow"]) == ""
    known = ["MODA", "AttenCraft", "SigmoidAttention", "AttnRank", "KIVI"]
    assert nearest("Sigmod", known) == " Did you mean SigmoidAttention, MODA?"
    assert nearest("attn", known) == " Did you mean AttnRank, AttenCraft?"
    assert nearest("atn", known) == " Did you mean AttnRank, AttenCraft?"
    assert nearest("kiv", known) == " Did you mean KIVI?"
    assert str(CatalogueError("plain words")) == "plain words"


def test_where_a_paper_appeared_tells_its_year_once() -> None:
    assert Paper("k", "t", "a", 2025, venue="ICCV 2025").appeared == "ICCV 2025"
    assert Paper("k", "t", "a", 2025, venue="TMLR").appeared == "TMLR, 2025"
    assert OTHER.appeared == "arXiv, 2020"


def test_bibtex_is_made_of_the_paper() -> None:
    text = Paper("P1", "Some Title", "Ada B. Tester, Bo Other", 2025, "2501.00001", "ICML").bibtex()
    assert text.startswith("@article{tester2025some,")
    assert "author = {Ada B. Tester and Bo Other}" in text
    assert "url = {https://arxiv.org/abs/2501.00001}" in text


def test_a_stack_cites_all_papers_whose_formula_it_is() -> None:
    class Shared(Method):
        paper = Paper("k", "Mine", "Ada Tester", 2021, also=(OTHER,))

        @at(Site.SCORES)
        def scale(self, scores: Tensor, call: Call) -> Tensor:
            return scores

    assert Shared.paper.every == (Shared.paper, OTHER)
    assert Stack((Shared(), Shared())).cite() == f"{Shared.paper.bibtex()}\n\n{OTHER.bibtex()}"


ranges = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4).map(tuple)


@given(a=ranges, b=ranges)
def test_ranges_behave_as_sets(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]) -> None:
    def points(r: tuple[tuple[int, int], ...]) -> set[int]:
        return {i for lo, hi in r for i in range(lo, hi)}

    assert points(union(a, b)) == points(a) | points(b)
    assert points(intersection(a, b)) == points(a) & points(b)


@settings(max_examples=60)
@given(
    window=st.integers(1, 9), sinks=st.integers(0, 4), start=st.integers(0, 6), rows=st.integers(1, 6),
    pads=st.lists(st.integers(0, 5), min_size=1, max_size=3), keys=st.integers(1, 16),
)  # fmt: skip
def test_no_kept_pair_lies_outside_the_columns_of_a_mask(
    window: int, sinks: int, start: int, rows: int, pads: list[int], keys: int
) -> None:
    pad = torch.tensor(pads)
    q, k = Positions.row(start, rows, pad=pad), Positions.row(0, keys, pad=pad)
    mask = Mask((Causal(),)) & (Window(window) | First(sinks))
    keep = mask.keeps(Pairs(q, k, 1, slice(0, rows), slice(0, keys)))
    assert keep is not None
    seen = set(keep.flatten(0, -2).any(0).nonzero().flatten().tolist())
    columns = {i for lo, hi in mask.columns(q, k, slice(0, rows)) for i in range(lo, hi)}
    assert seen <= columns


def test_rules_join() -> None:
    positions = Positions.row(0, 5)
    pairs = Pairs(positions, positions, 1, slice(0, 5), slice(0, 5))
    even = Where(lambda q, k: (q - k) % 2 == 0)
    both = (Window(3) & even).keeps(pairs)
    assert torch.equal(both, Window(3).keeps(pairs) & even.keeps(pairs))
    assert Mask().keeps(pairs) is None
    with pytest.raises(DefinitionError, match=r"Rule does not say which pairs are computed: write its keeps\(pairs\)"):
        Mask((Rule(),)).keeps(pairs)


def test_a_prompt_reorders_its_documents_and_nothing_else() -> None:
    prompt = Prompt(tuple(range(10)), {"documents": ((1, 3), (4, 7)), "question": ((8, 10),)})
    new = prompt.reordered("documents", (1, 0))
    assert new.tokens == (0, 4, 5, 6, 3, 1, 2, 7, 8, 9)
    assert new.roles["documents"] == ((1, 4), (5, 7))
    assert new.roles["question"] == ((8, 10),)
    assert new.reordered("documents", (1, 0)).tokens == prompt.tokens


def test_a_prompt_of_some_of_its_tokens() -> None:
    roles = {"documents": ((1, 3), (4, 7)), "needle": ((2, 3),), "context": ((0, 7),)}
    new = Prompt(tuple(range(10, 20)), roles).only((1, 4, 6, 9))
    assert new.tokens == (11, 14, 16, 19)
    assert new.roles == {"documents": ((0, 1), (1, 3)), "needle": (), "context": ((0, 3),)}
    assert Prompt((1, 2)).only((0, 1)) == Prompt((1, 2))


def test_a_piece_of_a_prompt_has_the_spans_that_lie_within_it() -> None:
    roles = {"documents": ((1, 3), (4, 7)), "needle": ((2, 3),), "context": ((0, 7),), "across": ((3, 5),)}
    new = Prompt(tuple(range(10, 20)), roles).piece(4, 8)
    assert new.tokens == (14, 15, 16, 17)
    assert new.roles == {"documents": ((0, 3),), "needle": (), "context": (), "across": ()}


def test_a_prompt_takes_in_another_with_its_roles() -> None:
    roles = {"documents": ((1, 3), (3, 5)), "context": ((0, 5),)}
    other = Prompt((7, 8), {"documents": ((0, 1),), "new": ((0, 2),)})
    new = Prompt(tuple(range(10, 16)), roles).inserted(3, other)
    assert new.tokens == (10, 11, 12, 7, 8, 13, 14, 15)
    assert new.roles == {"documents": ((1, 3), (3, 4), (5, 7)), "context": ((0, 7),), "new": ((3, 5),)}
    first, last = (Prompt((1, 2), {"all": ((0, 2),)}).inserted(place, Prompt((9,))) for place in (0, 2))
    assert (first.tokens, first.roles) == ((9, 1, 2), {"all": ((1, 3),)})
    assert (last.tokens, last.roles) == ((1, 2, 9), {"all": ((0, 2),)})


def test_spans_inside_a_reordered_document_move_along() -> None:
    roles = {"documents": ((1, 3), (4, 7)), "needle": ((2, 3), (4, 6)), "context": ((0, 7),)}
    new = Prompt(tuple(range(10)), roles).reordered("documents", (1, 0))
    assert [new.tokens[a:b] for a, b in new.roles["needle"]] == [(2,), (4, 5)]
    assert new.roles["context"] == ((0, 7),)


@pytest.mark.parametrize("tensors", [5, [1], {"x": 5}, None])
def test_what_is_no_tensors_by_name_is_not_fitted(tensors: Any) -> None:
    with pytest.raises(FieldError, match="must be tensors by name"):
        Fitted(tensors)


def test_fitted_tensors_are_values(tmp_path: object) -> None:
    x = torch.ones(2, 3)
    a, b = Fitted({"x": x}), Fitted({"x": torch.ones(2, 3)})
    x.zero_()
    assert a == b
    assert hash(a) == hash(b)
    assert a != Fitted({"x": torch.zeros(2, 3)})
    a.save(f"{tmp_path}/f.safetensors")
    assert Fitted.load(f"{tmp_path}/f.safetensors") == a
    assert repr(a).startswith("Fitted(x (2, 3); ")


def test_readers_are_told_from_editors() -> None:
    assert [e.reads for e in Shares.edits] == [True]
    mark = reads(Site.KEY)(lambda self, x, call: Sum.of(x))
    assert mark.__heedful_edit__.reads
