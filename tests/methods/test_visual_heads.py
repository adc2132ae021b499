"""Weight and concentration query by query over the model's own maps, planted heads, padding, tiles and writing."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Call, Fitted, Method, Site, at
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, StatisticError
from heedful.methods.observe.visual_heads import Looks, VisualHeads
from tests import readers
from tests.readers import ids, padded

METHOD = VisualHeads()
SPANS = ((2, 6), (8, 9))
ROLES = {"image": SPANS}
found = partial(readers.found, method=METHOD, roles=ROLES)
IMAGE = [2, 3, 4, 5, 8]


def same(a: Looks, b: Looks) -> bool:
    pairs = ((a.weight, b.weight), (a.concentration, b.concentration), (a.score, b.score))
    return a.layers == b.layers and all(close(x.float(), y.float()) for x, y in pairs)


def by_hand(maps: Tensor, rows: list[int], image: list[int]) -> tuple[float, float, float]:
    """Of one head `[b n n]`: means over texts and rows."""
    each = []
    for text in maps.tolist():
        for q in rows:
            weight = sum(text[q][k] for k in image)
            shares = [text[q][k] / weight for k in image]
            concentration = 1 + sum(p * math.log(p) for p in shares if p > 0) / math.log(len(image))
            each.append((weight, concentration, weight * concentration))
    return tuple(sum(x) / len(each) for x in zip(*each, strict=True))


@pytest.mark.parametrize(("kind", "rows"), [("llama", range(9, 14)), ("bert", [0, 1, 6, 7, *range(9, 14)])])
def test_is_the_product_of_weight_and_concentration(kind: str, rows) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    text = torch.cat([ids(14, seed) for seed in range(3)])
    with torch.no_grad():
        maps = model(input_ids=text, output_attentions=True).attentions
    looks = found(model, {"input_ids": text[:2]}, {"input_ids": text[2:]})
    assert looks.layers == (0, 1)
    for layer in range(2):
        for head in range(4):
            weight, concentration, score = by_hand(maps[layer][:, head].double(), list(rows), IMAGE)
            assert float(looks.weight[layer, head]) == pytest.approx(weight, rel=1e-5)
            assert float(looks.concentration[layer, head]) == pytest.approx(concentration, rel=1e-4)
            assert float(looks.score[layer, head]) == pytest.approx(score, rel=1e-4)


class Plant(Method):
    """Puts maps `[h n n]` in the place of a model's own."""

    paper = METHOD.paper
    maps: Fitted

    @at(Site.PATTERN)
    def put(self, weights: Tensor, call: Call) -> Tensor:
        return self.maps["maps"][:, call.rows][..., call.cols].expand_as(weights).to(weights.dtype)


def planted(method: VisualHeads, roles, *rows: dict[int, float]) -> Looks:
    """What is found of heads all of whose queries look so."""
    maps = torch.zeros(4, 12, 12)
    for head, row in enumerate(rows):
        for place, weight in row.items():
            maps[head, :, place] = weight
    with (
        heedful.attach(models.tiny("bert"), Plant(Fitted({"maps": maps})) | method, roles=roles) as run,
        torch.no_grad(),
    ):
        run(input_ids=ids(12))
        return run[method]


def test_finds_planted_heads() -> None:
    even = dict.fromkeys(IMAGE, 0.16)
    looks = planted(METHOD, ROLES, {0: 0.5, 3: 0.5}, {0: 0.2, **even}, {0: 1.0}, {3: 0.25, 4: 0.25, 0: 0.5})
    half = 1 - math.log(2) / math.log(5)
    assert looks.weight[0].tolist() == pytest.approx([0.5, 0.8, 0.0, 0.5])
    assert looks.concentration[0].tolist() == pytest.approx([1.0, 0.0, 0.0, half], abs=1e-6)
    assert looks.score[0].tolist() == pytest.approx([0.5, 0.0, 0.0, half / 2], abs=1e-6)
    assert list(looks.ranked)[:4] == [(0, 0), (1, 0), (0, 3), (1, 3)]
    assert list(looks.heads) == [(0, 0), (1, 0), (0, 3), (1, 3)]
    assert str(looks).startswith("4 heads of score 0.1 or more; highest 0.0 0.50, 1.0 0.50, 0.3 0.28, 1.3 0.28,")


def test_one_token_has_all_of_the_weight_on_it() -> None:
    looks = planted(METHOD, {"image": ((3, 4),)}, *({0: 0.5, 3: 0.5},) * 4)
    assert looks.concentration[0].tolist() == [1.0] * 4
    assert looks.score[0].tolist() == pytest.approx([0.5] * 4)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    model = models.tiny("llama")
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    assert same(found(model, padded(short, long, left)), apart)


def test_each_text_may_have_a_span_of_its_own() -> None:
    model = models.tiny("llama")
    one, two = ids(14, 1), ids(14, 2)
    each = [{"image": ((2, 6),)}, {"image": ((3, 5), (7, 10))}]
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        for text, roles in zip((one, two), each, strict=True):
            run.roles = roles
            run(input_ids=text)
        apart = run[METHOD]
    assert same(found(model, {"input_ids": torch.cat([one, two])}, roles=each), apart)


def test_tiles_and_pieces_do_not_matter() -> None:
    model = models.tiny("llama")
    text = torch.cat([ids(16, seed) for seed in range(2)])
    whole = found(model, {"input_ids": text})
    assert same(found(model, {"input_ids": text}, backend="tiled", tile_rows=3), whole)
    with heedful.attach(model, METHOD, roles=ROLES) as run, torch.no_grad():
        cache = run(input_ids=text[:, :11], use_cache=True)[CACHE]
        run(input_ids=text[:, 11:], **{CACHE: cache}, use_cache=True)
    assert same(run[METHOD], whole)


def test_while_writing_it_is_of_written_tokens() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    method = METHOD.when("decode")
    with heedful.attach(model, method, roles=ROLES) as run, torch.no_grad():
        written = run.generate(input_ids=ids(12), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        maps = model(written, output_attentions=True).attentions
        looks = run[method]
    for head in range(4):
        assert float(looks.score[1, head]) == pytest.approx(
            by_hand(maps[1][:, head].double(), [12, 13, 14], IMAGE)[2], rel=1e-4
        )


def test_reads_its_own_span_alone() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, METHOD, roles={"audio": ((0, 3),)}) as run:
        run(input_ids=ids(12))
        with pytest.raises(StatisticError):
            run[METHOD]
    other = VisualHeads("audio")
    assert found(model, {"input_ids": ids(12)}, method=other, roles={"audio": ((0, 3),)}).layers == (0, 1)
    t5 = models.tiny("t5")
    assert len(found(t5, models.tiny_inputs(t5, length=12)).layers) == 4  # of six layers two look across


def test_tells_what_a_reader_wants_to_know() -> None:
    score = torch.tensor([[0.02, 0.3], [0.5, float("nan")]], dtype=torch.float64)
    weight, concentration = score * 1.5, score * 0.5
    told = METHOD.describe(Looks((1, 4), weight, concentration, score, 0.3))
    heads, within, depth, best = told.figures
    assert torch.equal(heads.values.nan_to_num(), score.nan_to_num())
    assert torch.equal(within.values.nan_to_num(), concentration.nan_to_num())
    assert (within.low, within.high) == (0, 1)
    assert heads.layers == within.layers == depth.x == (1, 4)
    assert close(depth.lines["score"], torch.tensor([0.16, 0.5], dtype=torch.float64))
    assert close(depth.lines["weight"], torch.tensor([0.24, 0.75], dtype=torch.float64))
    assert close(depth.lines["concentration"], torch.tensor([0.08, 0.25], dtype=torch.float64))
    assert best.rows == [("4.0", "0.50", "75%", "0.25"), ("1.1", "0.30", "45%", "0.15"), ("1.0", "0.02", "3%", "0.01")]
    assert told.roles[0].heads == {(4, 0): 0.5, (1, 1): 0.3}
    assert told.findings[0].text == (
        "2 heads of 3 look hard at some of the image, in layers 1 to 4; most does 4.0, with a score of 0.50."
    )
    none = METHOD.describe(Looks((1, 4), weight, concentration, score, 0.6)).findings[0]
    assert none.text == "No head looks hard at some of the image: the highest score is 0.50."
    assert none.weight < told.findings[0].weight


def test_tells_nothing_where_no_query_is_behind_the_span() -> None:
    looks = found(models.tiny("llama"), {"input_ids": ids(9)}, roles={"image": ((4, 9),)})
    assert bool(looks.score.isnan().all())
    assert looks.ranked == {}
    assert not METHOD.describe(looks).figures


def test_lists_ten_heads() -> None:
    score = torch.arange(1.0, 13.0)[None].double() / 20
    looks = Looks((0,), score, score, score, 0.1)
    assert len(METHOD.describe(looks).figures[-1].rows) == 10
    assert str(looks).count(",") == 9


@pytest.mark.parametrize(("field", "bad"), [("role", ""), ("least", 0.0), ("least", 1.0)])
def test_says_what_is_wrong(field: str, bad: object) -> None:
    with pytest.raises(FieldError, match=field):
        VisualHeads(**{field: bad})
