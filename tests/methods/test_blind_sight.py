"""BlindSight: each head's mask against loops over pairs, and what a fit measures against a model's own maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from heedful import attach, fit, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.regions import PerText, Region
from heedful.methods import BlindSight
from heedful.methods.sparse.prefill.blind_sight import _Kept

N = 17
SPANS = ((2, 6), (6, 9), (11, 15))
SINKS, DOCUMENT, BOTH, DENSE = range(4)
SHARES = torch.tensor([[0.9, 0.95, 0.99], [0.2, 0.8, 0.7], [0.1, 0.7, 0.8], [0.1, 0.2, 0.79]])  # one head a kind
Spans = tuple[tuple[int, int], ...]


def home(place: int, spans: Spans) -> int | None:
    return next((n for n, (start, stop) in enumerate(spans) if start <= place < stop), None)


def sees(kind: int, i: int, j: int, spans: Spans, sinks: int) -> bool:
    """Whether the token at place i computes the key at place j."""
    if j > i:
        return False
    mine, theirs = home(i, spans), home(j, spans)
    if kind == DENSE or mine is None or theirs is None:
        return True
    own, first = mine == theirs, j - spans[theirs][0] < sinks
    return {SINKS: first, DOCUMENT: own, BOTH: own or first}[kind]


def table(kind: int, spans: Spans, sinks: int, n: int = N) -> torch.Tensor:
    return torch.tensor([[sees(kind, i, j, spans, sinks) for j in range(n)] for i in range(n)])


def fitted(keep: float = 0.8, sinks: int = 1) -> BlindSight:
    return BlindSight("facts", sinks, keep, Fitted({"kept.0": SHARES}))


def tile(bare: Bare, method: BlindSight, **roles: Any) -> torch.Tensor:
    call = replace(bare.call, roles=roles)
    part = call.tile(slice(0, N), slice(0, N))
    keep = method.part(call.mask, call).keeps(part.pairs)
    assert keep is not None
    return keep.expand(bare.shape.b, 4, N, N)


@pytest.mark.parametrize("sinks", [1, 2, 9])
def test_each_head_sees_as_its_kind_says(sinks: int) -> None:
    keep = tile(Bare(Shape(b=1, q=N, k=N)), fitted(sinks=sinks), facts=SPANS)
    for kind in range(4):
        assert torch.equal(keep[0, kind], table(kind, SPANS, sinks)), kind


def test_each_text_has_documents_of_its_own() -> None:
    other = ((0, 5), (5, 17))
    keep = tile(Bare(Shape(q=N, k=N)), fitted(), facts=PerText((Region(SPANS), Region(other))))
    for text, spans in enumerate((SPANS, other)):
        for kind in range(4):
            assert torch.equal(keep[text, kind], table(kind, spans, 1))


@pytest.mark.parametrize(
    ("keep", "kinds"),
    [(0.8, [0, 1, 2, 3]), (0.79, [0, 1, 2, 2]), (0.95, [1, 3, 3, 3]), (0.0, [0, 0, 0, 0]), (1.0, [3, 3, 3, 3])],
)
def test_a_head_has_the_first_mask_that_keeps_enough(keep: float, kinds: list[int]) -> None:
    assert fitted(keep).kinds(Bare(Shape(b=1)).call).tolist() == kinds


def test_heads_are_softmax_over_what_they_see() -> None:
    bare = Bare(Shape(b=1, q=N, k=N), dtype=torch.float64)
    bare.call = replace(bare.call, roles={"facts": SPANS})
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    seen = torch.stack([table(kind, SPANS, 1) for kind in range(4)])
    scores = (bare.q @ k.mT / bare.shape.d**0.5).masked_fill(~seen, -torch.inf)
    assert close(bare.run(fitted(), "tiled", 5)[0], scores.softmax(-1) @ v)


def by_hand(weights: torch.Tensor, spans: Spans, sinks: int, begin: int = 0) -> list[list[float]]:
    """What each narrow mask keeps of the weight of documents' tokens of one text, and their number, for each head."""
    out = []
    for head in weights:
        row = [0.0] * 4
        for i in range(begin, len(head)):
            if home(i - begin, spans) is None:
                continue
            row[3] += 1
            for kind in range(3):
                for j in range(begin, i + 1):
                    row[kind] += float(head[i, j]) * sees(kind, i - begin, j - begin, spans, sinks)
        out.append(row)
    return out


def test_a_fit_measures_what_each_mask_keeps() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    by = torch.Generator().manual_seed(0)
    total: dict[int, torch.Tensor] = {}
    batches: list[dict[str, Any]] = []
    for length, spans in ((N, SPANS), (13, ((0, 4), (4, 12)))):
        ids = torch.randint(3, 127, (2, length), generator=by)
        batches.append({"input_ids": ids, "roles": {"facts": spans}})
        with torch.no_grad():
            maps = model(ids, output_attentions=True).attentions
        for layer, weights in enumerate(maps):
            rows = torch.tensor([by_hand(text, spans, 2) for text in weights]).sum(0)
            total[layer] = total.get(layer, torch.zeros(())) + rows
    found = fit(BlindSight("facts", 2), model, batches)
    assert found.kept is not None
    assert found.keep == 0.9
    assert sorted(found.kept) == ["kept.0", "kept.1"]
    for layer, rows in total.items():
        assert close_model(found.kept[f"kept.{layer}"], rows[:, :3] / rows[:, 3:])


def test_padding_is_no_document() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    ids = torch.randint(3, 127, (2, N), generator=torch.Generator().manual_seed(1))
    text = torch.ones(2, N, dtype=torch.long)
    text[1, :3] = 0
    spans = ((0, 5), (5, 9))
    batch = {"input_ids": ids, "attention_mask": text, "roles": {"documents": spans}}
    with torch.no_grad():
        weights = model(ids, attention_mask=text, output_attentions=True).attentions[1]
    rows = torch.tensor([by_hand(weights[0], spans, 1), by_hand(weights[1], spans, 1, 3)]).sum(0)
    found = fit(BlindSight(), model, [batch])
    assert found.kept is not None
    assert close_model(found.kept["kept.1"], rows[:, :3] / rows[:, 3:])


def test_padding_behind_a_text_is_no_document() -> None:
    bare = Bare(Shape(q=N, k=N), text=torch.arange(N) < torch.tensor([[N], [8]]))
    call = replace(bare.call, roles={"documents": SPANS})
    weights = torch.ones(2, 4, N, N)
    part = call.tile(slice(0, N), slice(0, N))
    counted = _Kept("documents", 1).share(weights, part).value
    assert counted.shape == (4, 4)
    assert counted[:, 3].tolist() == [11.0 + 6.0] * 4  # all of three documents; of the other text, four and two


def test_random_kinds_are_the_seeds_and_each_layers_own() -> None:
    call = replace(Bare(Shape(h=64, g=2)).call, depth=2)
    one, same, other = (BlindSight(keep=0.5, seed=seed).kinds(call) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, BlindSight(keep=0.5, seed=1).kinds(replace(call, layer=1)))
    assert set(one.tolist()) == {0, 1, 2, 3}
    assert (BlindSight.neutral().kinds(call) == DENSE).all()
    assert BlindSight.neutral().idle(call)
    assert not BlindSight("documents", 1, 0.5, seed=1).idle(call)
    one_dense = Fitted({"kept.0": SHARES[2:]})
    few = replace(call, heads=2, depth=1)
    assert [BlindSight(keep=keep, kept=one_dense).idle(few) for keep in (0.75, 0.8, 0.9)] == [False, False, True]


def test_one_kind_alone_leaves_no_rule_for_others() -> None:
    call = replace(Bare(Shape(b=1)).call, roles={"documents": SPANS})
    assert len(BlindSight.neutral().part(call.mask, call).rules) == len(call.mask.rules)
    assert len(replace(fitted(), role="documents").part(call.mask, call).rules) == len(call.mask.rules) + 3


def test_it_leaves_cross_attention_alone() -> None:
    call = Bare().call
    for method in (BlindSight.example(), _Kept("documents", 1)):
        assert method.idle(replace(call, cross=True))
        assert not method.idle(call)


def test_a_model_reads_documents_through_it() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, 1, N)["input_ids"]
    roles = {"documents": SPANS}
    found = fit(BlindSight(), model, [{"input_ids": ids, "roles": roles}])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with attach(model, replace(found, keep=0.0), roles=roles) as run:
            narrow = run(input_ids=ids).logits
    assert close_model(narrow[:, :6], plain[:, :6]) is False
    assert close_model(narrow[:, :2], plain[:, :2])


def test_what_is_declared_and_refused() -> None:
    method = BlindSight()
    assert (method.role, method.sinks, method.keep, method.kept, method.seed) == ("documents", 1, 0.9, None, None)
    for bad in ({"role": ""}, {"sinks": 0}, {"keep": -0.1}, {"keep": 1.1}):
        with pytest.raises(FieldError, match=rf"BlindSight\.{next(iter(bad))}"):
            BlindSight(**bad)
    call = Bare(Shape(b=1)).call
    with pytest.raises(FieldError, match=r"BlindSight\.kept"):
        method.kinds(call)
    with pytest.raises(FieldError, match="another model"):
        fitted().kinds(replace(call, depth=2))
    model, ids = models.tiny("llama"), torch.arange(3, 12)[None]
    for roles in ({}, {"roles": {"facts": ((1, 4),)}}, {"roles": {"documents": ()}}):
        with pytest.raises(FieldError, match=r"BlindSight\.batches"):
            fit(method, model, [{"input_ids": ids, **roles}])
    with pytest.raises(FieldError, match=r"BlindSight\.batches = 0"):
        fit(method, model, [])
