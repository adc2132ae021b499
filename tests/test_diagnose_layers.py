"""Statistics of many layers merge as one, and give the bits that each layer's give by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import models
from heedful.core.stats import Cat, Histogram, Max, Mean, Moments, Statistic, Sum, TopK
from heedful.diagnosis.apart import Found, joined
from heedful.diagnosis.corpus import Corpus
from heedful.diagnosis.layers import by_layer, stacked, together
from heedful.diagnosis.measures import DEFAULT
from heedful.diagnosis.shards import Piece, Reader, Sums
from heedful.diagnosis.store import ADDED
from heedful.diagnosis.workers import opened, packed
from tests.test_corpus import TEXTS, lines
from tests.test_diagnose_texts import characters
from tests.test_stats import MAKERS


@dataclass(frozen=True, eq=False)
class Own(Sum):
    """One whose merge may be any."""


def shard(draw: random.Random, number: int) -> Found:
    """What a shard may give: some layers without anything, and layers of unlike width."""
    width = draw.randint(3, 5)
    out: Found = {}
    for layer in draw.sample(range(4), draw.randint(1, 4)):
        x = torch.randn(6, width + (layer == 3), dtype=torch.float64)
        for i, (kind, make) in enumerate(MAKERS.items()):
            out[f"{i}.look.{layer}"] = make(x if kind in ("Sum", "Mean", "Moments") else x[:, :3], 4 * number + layer)
        out[f"8.look.{layer}"] = Own.of(x.sum(0))
        out[f"9.look.{layer}"] = Sum.of(x.sum())
    return out


def same(one: Found, other: Found) -> bool:
    return one.keys() == other.keys() and all(
        type(stat) is type(other[key])
        and stat.settings() == other[key].settings()
        and stat.tensors().keys() == other[key].tensors().keys()
        and all(torch.equal(x, other[key].tensors()[name]) for name, x in stat.tensors().items())
        for key, stat in one.items()
    )


@pytest.mark.parametrize("seed", range(8))
def test_shards_add_up_to_the_same_bits_stacked_or_not(seed: int) -> None:
    draw = random.Random(seed)
    shards = [shard(draw, n) for n in range(5)]
    plain = reduce(joined, shards)
    found = reduce(together, map(stacked, shards))
    assert same(by_layer(found), plain)
    layers = [int(key.rpartition(".")[2]) for key in by_layer(found)]
    assert layers == sorted(layers)
    for one in shards:
        assert same(by_layer(stacked(one)), one)
        assert same(stacked(stacked(one)), stacked(one))


def test_layers_are_stacked_where_merging_is_element_by_element() -> None:
    alike = {f"0.look.{layer}": Sum.of(torch.ones(3)) for layer in (0, 1, 7)}
    assert list(stacked(alike)) == ["0.look.0,1,7"]
    assert stacked(alike)["0.look.0,1,7"].tensors()["total"].shape == (3, 3)
    for other in (Own.of(torch.ones(3)), Sum.of(torch.ones(2)), Mean.of(torch.ones(3), 1)):
        assert list(stacked({**alike, "0.look.8": other})) == ["0.look.0,1,7", "0.look.8"]
    unlike = {f"0.look.{n}": Histogram.of(torch.ones(3), (0.0, 1.0, 2.0 + n)) for n in range(2)}
    assert list(stacked(unlike)) == list(unlike)
    assert all(kind.by_element for kind in (Sum, Mean, Moments, Max, Histogram, TopK))
    assert not any(kind.by_element for kind in (Statistic, Cat, Own))


def test_what_is_alike_in_all_shards_is_added_up_once() -> None:
    """The first shard as the others: that of each part was laid out in full, and all sums with it."""
    count = torch.arange(1.0, 65.0, dtype=torch.float64)
    piece = Piece(dict.fromkeys(ADDED, 1) | {"skipped": [], "backends": []}, {})
    total = torch.rand(4, 32, 64, dtype=torch.float64)
    sent = packed(replace(piece, statistics={"0.look.0,1,2,3": Mean(total, count.expand(4, 32, 64).contiguous())}))
    sums = reduce(Sums.plus, (opened(sent) for _ in range(13)), Sums())
    for found, times in zip(sums.apart.values(), (3, 3, 3, 2, 2), strict=True):
        (stat,) = found.values()
        assert torch.equal(stat.tensors()["count"], times * count.expand(4, 32, 64))
        assert stat.tensors()["count"].untyped_storage().nbytes() == 64 * 8
        assert torch.equal(stat.tensors()["total"], sum([total] * (times - 1), total))


def test_the_default_measures_give_the_bits_of_each_layer_by_itself(tmp_path: Path) -> None:
    model: Any = models.tiny("gemma2")  # with a window in one of its layers
    read = Reader(model, characters(), DEFAULT, 64, 1, {})
    pieces = [read(shard) for shard in Corpus(lines(tmp_path, *TEXTS), shard=200).shards()]
    assert len(pieces) > 4
    assert any("," in key for key in pieces[0].statistics)
    sums = reduce(Sums.plus, pieces, Sums())
    parts = [[by_layer(piece.statistics) for piece in pieces[i::5]] for i in range(5)]
    assert len(sums.parts) == 5
    assert all(same(found, reduce(joined, wanted)) for found, wanted in zip(sums.parts, parts, strict=True))
    assert same(sums.whole, reduce(joined, sums.parts))
