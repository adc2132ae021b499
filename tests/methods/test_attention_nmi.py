"""Mutual information in loops over the model's own maps, its ends by planted maps, padding, tiles and pieces."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Call, Method, Site, at
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.observe.attention_nmi import AttentionNMI, Dependence
from tests import readers
from tests.readers import ids, padded

METHOD = AttentionNMI()
found = partial(readers.found, method=METHOD)
SIDE = 20  # pixels; 5 x 5 patches behind a class token


def same(a: Dependence, b: Dependence) -> bool:
    return a.layers == b.layers and close(a.values.float(), b.values.float())


def by_hand(joint: Tensor) -> float:
    """NMI of one map `[q k]` whose rows add up to one, by the definition of mutual information."""
    n, m = joint.shape
    joint = joint.double() / n
    q, k = joint.sum(1).tolist(), joint.sum(0).tolist()
    mutual = sum(
        float(joint[i, j]) * math.log(float(joint[i, j]) / (q[i] * k[j]))
        for i in range(n)
        for j in range(m)
        if joint[i, j] > 0
    )
    own, theirs = (-sum(p * math.log(p) for p in each if p > 0) for each in (q, k))
    return mutual / math.sqrt(own * theirs)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_the_mutual_information_of_the_maps(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    text = torch.cat([ids(9, seed) for seed in range(3)])
    with torch.no_grad():
        maps = model(input_ids=text, output_attentions=True).attentions
    seen = found(model, {"input_ids": text[:2]}, {"input_ids": text[2:]})
    assert seen.layers == (0, 1)
    for layer in range(2):
        for head in range(4):
            each = [by_hand(row[head]) for row in maps[layer]]
            assert float(seen.values[layer, head]) == pytest.approx(sum(each) / 3, rel=1e-4)


def test_of_an_image_patches_alone_are_taken() -> None:
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    seen = found(models.tiny("vit", image_size=SIDE), {"pixel_values": pixels})
    with torch.no_grad():
        eager = models.tiny("vit", image_size=SIDE, attn_implementation="eager")
        maps = eager(pixel_values=pixels, output_attentions=True).attentions
    for layer in range(2):
        among = maps[layer][..., 1:, 1:].double()
        among = among / among.sum(-1, keepdim=True)
        for head in range(4):
            wanted = (by_hand(among[0, head]) + by_hand(among[1, head])) / 2
            assert float(seen.values[layer, head]) == pytest.approx(wanted, rel=1e-4)


class Plant(Method):
    """Puts maps `[h n n]` in the place of a model's own."""

    paper = METHOD.paper
    maps: heedful.authoring.Fitted

    @at(Site.PATTERN)
    def put(self, weights: Tensor, call: Call) -> Tensor:
        return self.maps["maps"][:, call.rows][..., call.cols].expand_as(weights).to(weights.dtype)


def planted(*maps: Tensor) -> Tensor:
    """What is found of a layer of these heads."""
    bert = models.tiny("bert")
    plant = Plant(heedful.authoring.Fitted({"maps": torch.stack(maps)}))
    with heedful.attach(bert, plant | METHOD) as run, torch.no_grad():
        run(input_ids=ids(maps[0].shape[0]))
        return run[METHOD].values[0]


def test_its_ends_are_one_s_own_place_and_what_all_look_at() -> None:
    n = 12
    shared = torch.arange(1.0, n + 1).expand(n, n) / (n * (n + 1) / 2)
    star = torch.zeros(n, n)
    star[:, 3] = 1.0
    band = torch.eye(n).roll(1, 0) / 2 + torch.eye(n) / 2
    own, all_alike, at_one, two = planted(torch.eye(n).roll(5, 0), shared, star, band).tolist()
    assert own == pytest.approx(1.0)
    assert all_alike == pytest.approx(0.0, abs=1e-6)
    assert at_one == 0.0
    assert two == pytest.approx(1 - math.log(2) / math.log(n), rel=1e-6)


def test_rows_that_look_at_no_patch_do_not_count() -> None:
    model = models.tiny("vit", image_size=SIDE)
    own = torch.zeros(26, 26)
    own[1:, 1:] = torch.eye(25)
    own[1:4, 1:], own[1:4, 0] = 0.0, 1.0  # three patches look at the class token alone
    plant = Plant(heedful.authoring.Fitted({"maps": own.expand(4, -1, -1).contiguous()}))
    with heedful.attach(model, plant | METHOD) as run, torch.no_grad():
        run(pixel_values=torch.randn(1, 3, SIDE, SIDE))
        assert run[METHOD].values[0].tolist() == pytest.approx([1.0] * 4)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    model = models.tiny("llama")
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    assert same(found(model, padded(short, long, left)), apart)


@pytest.mark.parametrize("cuts", [(8, 16), (1,), (3, 5, 7)])
def test_tiles_and_pieces_do_not_matter(cuts: tuple[int, ...]) -> None:
    model = models.tiny("llama")
    text = torch.cat([ids(24, seed) for seed in range(3)])
    whole = found(model, {"input_ids": text})
    assert same(found(model, {"input_ids": text}, backend="tiled", tile_rows=5), whole)
    cache = None
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        for piece in text.tensor_split(cuts, dim=1):
            cache = run(input_ids=piece, use_cache=True, **{CACHE: cache})[CACHE]
        assert same(run[METHOD], whole)
        run(input_ids=ids(1).expand(3, -1), use_cache=True, **{CACHE: cache})  # a decoding step
        run(input_ids=ids(5).expand(3, -1), use_cache=True, **{CACHE: cache})  # and what follows it
        assert same(run[METHOD], whole)


def test_one_token_depends_on_nothing() -> None:
    model = models.tiny("llama")
    assert same(found(model, {"input_ids": ids(1)}, {"input_ids": ids(9)}), found(model, {"input_ids": ids(9)}))
    nothing = found(model, {"input_ids": ids(1)})
    assert bool(nothing.values.isnan().all())
    assert not METHOD.describe(nothing).figures


def test_looks_at_no_other_text() -> None:
    t5 = models.tiny("t5")
    assert len(found(t5, models.tiny_inputs(t5, length=8)).layers) == 4  # of six layers two look across


def test_names_layers_by_their_mean() -> None:
    values = torch.tensor([[0.02, 0.16], [0.3, 0.2], [0.1, 0.7], [0.12, float("nan")]], dtype=torch.float64)
    seen = Dependence((0, 1, 2, 5), values, 0.1, 0.25)
    assert seen.labels == {0: "global", 1: "hybrid", 2: "local", 5: "hybrid"}
    assert [seen.label(x) for x in (0.0999, 0.1, 0.25, 0.2501)] == ["global", "hybrid", "hybrid", "local"]
    assert str(seen).endswith("by layer 0: 0.09 global, 1: 0.25 hybrid, 2: 0.40 local, 5: 0.12 hybrid")
    told = METHOD.describe(seen)
    heads, depth = told.figures
    assert heads.layers == depth.x == (0, 1, 2, 5)
    assert torch.equal(heads.values.nan_to_num(), values.nan_to_num())
    assert (heads.low, heads.high) == (0, 1)
    assert close(depth.lines["mean of heads"], torch.tensor([0.09, 0.25, 0.4, 0.12]))
    roles = {role.name: list(role.heads.items()) for role in told.roles}
    assert roles["global attention"] == [((0, 0), 0.02)]
    assert roles["hybrid attention"] == [((1, 1), 0.2), ((0, 1), 0.16), ((5, 0), 0.12), ((2, 0), 0.1)]
    assert roles["local attention"] == [((2, 1), 0.7), ((1, 0), 0.3)]
    assert told.findings[0].text == (
        "By the mutual information of queries and keys, 0.09 to 0.40 by layer, attention is in 1 layer global, "
        "2 layers hybrid, 1 layer local."
    )


def test_the_most_global_head_comes_first() -> None:
    told = METHOD.describe(Dependence((0,), torch.tensor([[0.05, 0.01, 0.03]], dtype=torch.float64), 0.1, 0.25))
    assert list(told.roles[0].heads) == [(0, 1), (0, 2), (0, 0)]
    assert told.findings[0].text.endswith("attention is in 1 layer global.")


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (1.0, 1.0), (0.2, 0.2), (0.1, 1.1)])
def test_says_what_is_wrong(low: float, high: float) -> None:
    with pytest.raises(FieldError, match=r"low|high"):
        AttentionNMI(low, high)
    assert AttentionNMI(0.0, 1.0).low == 0.0


def test_one_token_is_called_nothing() -> None:
    assert found(models.tiny("llama"), {"input_ids": ids(1)}).labels == {}
