"""A MASK edit of a method that is not causal may leave causality out, and nothing else."""

from __future__ import annotations

import pytest
import torch

from heedful import Method, Site, attach, models
from heedful.authoring import at, reads
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.mask import Causal, Mask, Padding, Where, Window
from heedful.core.method import Stack
from tests.samples import PAPER
from tests.test_engine import HERE, run

TEXT = torch.ones(2, 19, dtype=torch.bool)
TEXT[0, :3] = False
BACKENDS = [name for name in HERE if name != "sdpa"]  # which takes no method's mask


class Ahead(Method):
    """Leaves causality out, and lets a token see the two that follow."""

    paper = PAPER
    causal = False

    @at(Site.MASK)
    def open(self, mask: Mask, call: Call) -> Mask:
        return Mask((*(rule for rule in mask.rules if not isinstance(rule, Causal)), Where(lambda q, k: k <= q + 2)))


class Shut(Ahead):
    """The same, and says that later tokens change nothing."""

    causal = True


class Blind(Method):
    """Leaves out all that the mask says."""

    paper = PAPER
    causal = False

    @at(Site.MASK)
    def open(self, mask: Mask, call: Call) -> Mask:
        return Mask((Where(lambda q, k: k <= q + 2),))


class Near3(Method):
    """Drops what lies three tokens back or further."""

    paper = PAPER

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & Window(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causality_may_go(backend: str) -> None:
    bare = Bare(text=TEXT)
    want = run(Stack(), Bare(text=TEXT, rules=(Padding(TEXT), Where(lambda q, k: k <= q + 2))))
    assert close(run(Ahead(), bare, backend), want)


def test_for_some_heads_alone() -> None:
    bare = Bare(text=TEXT)
    plain, opened = run(Stack(), bare), run(Ahead(), bare)
    found = run(Stack((Ahead().on(heads=[1, 2]),)), bare)
    assert close(found, torch.stack([plain[:, 0], opened[:, 1], opened[:, 2], plain[:, 3]], 1))
    assert close(run(Stack((Ahead().on(heads=[0, 1, 2, 3]),)), bare), opened)


def test_for_some_heads_and_then_for_others() -> None:
    bare = Bare(text=TEXT)
    plain, opened = run(Stack(), bare), run(Ahead(), bare)
    for first, then in (([1], [2]), ([1], [1, 2]), ([1, 2], [2]), ([2], [1])):
        found = run(Stack((Ahead().on(heads=first), Ahead().on(heads=then))), bare)
        assert close(found, torch.stack([opened[:, h] if h in {*first, *then} else plain[:, h] for h in range(4)], 1))
    assert close(run(Ahead().on(heads=[1]) | Ahead(), bare), opened)
    with pytest.raises(SiteError, match="may leave causality out"):
        run(Ahead().on(heads=[1]) | Blind(), bare)


def test_what_keeps_causality_leaves_it_where_it_was() -> None:
    class Near(Method):
        paper = PAPER
        causal = False

        @at(Site.MASK)
        def narrow(self, mask: Mask, call: Call) -> Mask:
            assert mask.causal
            return mask & Window(3)

    bare = Bare(text=TEXT)
    want = run(Stack((Near3().on(heads=[1, 2]), Ahead().on(heads=[1]))), bare)
    assert close(run(Ahead().on(heads=[1]) | Near().on(heads=[1, 2]), bare), want)


def test_what_others_narrow_stays_narrow() -> None:
    bare = Bare(text=TEXT)
    want = run(Stack(), Bare(text=TEXT, rules=(Padding(TEXT), Window(3), Where(lambda q, k: k <= q + 2))))
    for stack in (Near3() | Ahead(), Ahead() | Near3()):
        assert close(run(stack, bare), want)


@pytest.mark.parametrize("method", [Shut(), Blind()])
def test_nothing_else_may_go(method: Method) -> None:
    with pytest.raises(SiteError, match=r"narrowed, .* whose `causal` is False may leave causality out"):
        run(method, Bare(text=TEXT))


def test_a_mask_that_only_opens_has_acted() -> None:
    class Open(Method):
        paper = PAPER
        causal = False

        @at(Site.MASK)
        def open(self, mask: Mask, call: Call) -> Mask:
            return Mask(tuple(rule for rule in mask.rules if not isinstance(rule, Causal)))

    model = models.tiny("llama")
    with torch.no_grad(), attach(model, Open()) as run:
        run(**models.tiny_inputs(model))
        assert run.active


def test_later_parts_still_know_that_the_model_is_causal() -> None:
    seen: dict[str, set[tuple[bool, bool]]] = {"mask": set(), "pattern": set()}

    class Looks(Method):
        paper = PAPER

        @at(Site.MASK)
        def narrow(self, mask: Mask, call: Call) -> Mask:
            seen["mask"].add((call.causal, mask.causal))
            return mask

        @reads(Site.PATTERN)
        def look(self, weights: torch.Tensor, call: Call) -> None:
            seen["pattern"].add((call.causal, call.mask.causal))

    for stack, causal in (
        (Ahead() | Looks(), False),
        (Stack((Looks(),)), True),
        (Ahead().on(heads=[1]) | Looks(), False),
    ):
        run(stack, Bare(text=TEXT))
        assert seen == {"mask": {(True, causal)}, "pattern": {(True, causal)}}
        seen["mask"].clear(), seen["pattern"].clear()
    run(Stack((Looks(),)), Bare(text=TEXT, rules=(Padding(TEXT),)))
    assert seen == {"mask": {(False, False)}, "pattern": {(False, False)}}


def test_who_comes_to_heads_that_are_open_is_given_no_causality() -> None:
    given: list[bool] = []

    class Looks(Method):
        paper = PAPER
        causal = False

        @at(Site.MASK)
        def look(self, mask: Mask, call: Call) -> Mask:
            given.append(mask.causal)
            return mask

    for heads in ([0], [1], [0, 1]):
        run(Ahead().on(heads=[0]) | Looks().on(heads=heads), Bare())
    assert given == [False, True, True]
