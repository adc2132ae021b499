"""SparseMM: heads' rooms against the authors' sums, and its scores against a model's own maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.methods import SparseMM

from .test_ada_kv import pooled
from .test_snap_kv import N, call_of, draw

SCORES = {0: [0.3, 0.0, 0.05, 0.15], 1: [0.1, 0.1, 0.1, 0.2]}
FITTED = Fitted({f"scores.{layer}": torch.tensor(row) for layer, row in SCORES.items()})


def rooms(layer: int, budget: int, window: int, floor: float) -> list[int]:
    every = sum(sum(row) for row in SCORES.values())
    heads = sum(len(row) for row in SCORES.values())
    even = budget - window
    least = int(floor * even)
    return [window + least + round(score / every * (even - least) * heads) for score in SCORES[layer]]


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("budget", "window", "kernel"), [(8, 3, 3), (6, 2, 1)])
def test_heads_have_room_by_their_scores(floor: float, layer: int, budget: int, window: int, kernel: int) -> None:
    method = SparseMM(budget, window, kernel, floor=floor, scores=FITTED)
    query, key, pad = draw(8, 0), draw(4, 1), torch.tensor([0, 3])
    entries, call = call_of(query, key, pad)
    kept = method.allot(entries, replace(call, layer=layer, depth=2))
    for b, start in enumerate(pad.tolist()):
        for head, room in enumerate(rooms(layer, budget, window, floor)):
            votes = pooled(query[b].unflatten(0, (4, -1))[head], key[b, head], window, kernel, start)
            best = sorted(range(len(votes)), key=lambda j: (-votes[j], j))[: room - window]
            wanted = sorted([start + j for j in best] + list(range(N - window, N)))
            assert kept[b, head].nonzero().flatten().tolist() == wanted


def test_layers_behind_its_list_are_none_of_its_model() -> None:
    entries, call = call_of(draw(8, 0), draw(4, 1))
    call = replace(call, layer=1, lowest=0, highest=1, depth=5)
    alone = replace(call, depth=2, highest=None)
    for method in (SparseMM(8, 3, 3, scores=FITTED), SparseMM(8, 3, 3, seed=1)):
        assert torch.equal(method.shares(call), method.shares(alone))
        assert torch.equal(method.allot(entries, call), method.allot(entries, alone))


def test_shares_that_float32_rounds_down() -> None:
    entries, call = call_of(draw(2, 0), draw(2, 1))
    even = Fitted({"scores.0": torch.zeros(2)})  # nothing to tell heads by
    for floor in (0.0, 1.0):
        kept = SparseMM(9, 3, 3, floor=floor, scores=even).allot(entries, call)
        assert kept.sum(-1).tolist() == [[9, 9]] * 2
    tenth = Fitted({"scores.0": torch.tensor([1.0, 0.0])})
    kept = SparseMM(12, 2, 3, floor=0.7, scores=tenth).allot(entries, call)
    assert kept[0].sum(-1).tolist() == [2 + 7 + 6, 2 + 7]


def test_a_budget_below_the_window_keeps_the_newest() -> None:
    kept = SparseMM(2, 5, 3, seed=0).allot(*call_of(draw(2, 0), draw(2, 1)))
    assert [kept[0, g].nonzero().flatten().tolist() for g in range(2)] == [[N - 2, N - 1]] * 2


def by_hand(maps: dict[int, Tensor], things: Tensor, groups: int) -> dict[int, list[float]]:
    found = {}
    for layer, weights in maps.items():
        scores = [0.0] * groups
        for text, row in enumerate(things.tolist()):
            for head, given in enumerate(weights[text, :, -1].tolist()):
                peak = max(range(len(given)), key=lambda j: given[j])
                scores[head * groups // weights.shape[1]] += row[peak] / sum(row)
        found[layer] = scores
    return found


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_heads_are_scored_by_what_they_look_at_most(backend: str) -> None:
    model: Any = models.tiny("llama", attn_implementation=backend)
    by = torch.Generator().manual_seed(0)
    batches = []
    for length in (9, 13):
        things = torch.rand(4, length, generator=by) < 0.6
        things[:, 1] = True
        batches.append({"input_ids": torch.randint(3, 127, (4, length), generator=by), "things": things})
    found = fit(SparseMM(floor=0.4), model, batches)
    model.set_attn_implementation("eager")
    want: dict[int, list[float]] = {}
    for batch in batches:
        with torch.no_grad():
            maps = dict(enumerate(model(batch["input_ids"], output_attentions=True).attentions))
        for layer, row in by_hand(maps, batch["things"], 2).items():
            want[layer] = [a + b for a, b in zip(want.get(layer, [0.0, 0.0]), row, strict=True)]
    assert found.floor == 0.4
    assert found.scores is not None
    assert sorted(found.scores) == [f"scores.{layer}" for layer in sorted(want)]
    for layer, row in want.items():
        assert close(found.scores[f"scores.{layer}"], torch.tensor(row))


@torch.no_grad()
def test_an_image_model_has_scores_in_its_language_model_alone() -> None:
    vision = {"image_size": 16}
    model: Any = models.tiny("llava", attn_implementation="eager", vision_config=vision, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22, batch=2)
    things = torch.zeros(2, 22, dtype=torch.bool)
    things[:, 3:9] = True
    found = fit(SparseMM(8, 2, 3), model, [{**inputs, "things": things}])
    assert found.scores is not None
    assert set(found.scores) == {"scores.2", "scores.3"}
    maps = dict(enumerate(model(**inputs, output_attentions=True).attentions, 2))
    for layer, row in by_hand(maps, things, 2).items():
        assert close(found.scores[f"scores.{layer}"], torch.tensor(row))
    for method in (found, SparseMM(8, 2, 3, seed=1)):
        with attach(model, method) as run:
            cache = run(**inputs, use_cache=True)[CACHE]
            counts = [torch.tensor(layer.counts).view(2, 2) for layer in cache.layers]
        assert abs(int(torch.stack(counts).sum()) - 2 * 4 * 8) <= 2 * 4


def test_random_scores_are_the_seeds() -> None:
    _, call = call_of(draw(4, 0), draw(4, 1))
    call = replace(call, depth=3, layer=2)
    one, same, other = (SparseMM(seed=seed).shares(call) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    every = torch.cat([SparseMM(seed=1).shares(replace(call, layer=layer)) for layer in range(3)])
    assert close(every.mean(), torch.tensor(1.0, dtype=torch.double))
    assert not torch.equal(every[0], every[1])


def test_what_is_declared_and_refused() -> None:
    method = SparseMM()
    assert (method.budget, method.window, method.kernel, method.floor) == (1024, 32, 7, 0.1)
    assert method.declares(90) == {}
    for floor in (-0.1, 1.1):
        with pytest.raises(FieldError, match=r"SparseMM\.floor"):
            SparseMM(floor=floor)
    with pytest.raises(FieldError, match=r"SparseMM\.window"):
        SparseMM(window=0)
    with pytest.raises(FieldError, match=r"SparseMM\.scores"):
        SparseMM(6, 2, 3).allot(*call_of(draw(2, 0), draw(2, 1)))
    _, call = call_of(draw(8, 0), draw(4, 1))
    for wrong in (replace(call, depth=3), replace(call, depth=2, kv_heads=8)):
        with pytest.raises(FieldError, match="another model"):
            SparseMM(6, 2, 3, scores=FITTED).shares(wrong)
    model: Any = models.tiny("llama")
    ids = torch.arange(3, 12)[None]
    for batches in ([], [{"input_ids": ids}], [{"input_ids": ids, "things": torch.zeros(1, 9, dtype=torch.bool)}]):
        with pytest.raises(FieldError, match=r"SparseMM\.batches"):
            fit(SparseMM(), model, batches)
    things, seen = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.long)
    seen[1, 7:] = 0
    with pytest.raises(FieldError, match="must be padded on the left"):
        fit(SparseMM(), model, [{"input_ids": ids.expand(2, -1), "attention_mask": seen, "things": things}])
    left = fit(SparseMM(), model, [{"input_ids": ids.expand(2, -1), "attention_mask": seen.flip(1), "things": things}])
    assert left.scores is not None
