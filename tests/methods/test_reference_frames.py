"""Frames against loops over the model's own maps, with padding, in pieces and in tiles, and planted frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Call, Method, Site, at
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.observe.reference_frames import FRAMES, Frame, Frames, ReferenceFrames
from tests.readers import ids, padded

METHOD = ReferenceFrames(share=0.12)  # a tiny random model has tokens on either side


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3)


def found(model, *inputs: dict, method: ReferenceFrames = METHOD, **how) -> Frames:
    with heedful.attach(model, method, **how) as run, torch.no_grad():
        for batch in inputs:
            run(**batch)
        return run[method]


def numbers(frame: Frame) -> Tensor:
    every = [frame.kinds[kind] for kind in FRAMES]
    return torch.tensor([frame.texts, *every, frame.first, frame.last, frame.between, frame.centralisation])


def same(a: Frames, b: Frames) -> bool:
    return list(a.layers) == list(b.layers) and all(close(numbers(a.layers[n]), numbers(b.layers[n])) for n in b.layers)


def by_hand(maps: Tensor, share: float) -> tuple[str, float, float, float, float]:
    """One text's maps `[h n n]`."""
    heads, n, _ = maps.shape
    drawn = [sum(float(maps[h, q, k]) for h in range(heads) for q in range(n)) / (heads * n) for k in range(n)]
    high = [k for k in range(n) if drawn[k] >= share]
    if 0 in high and n - 1 in high:
        kind = "bidirectional"
    elif len(high) == 1:
        kind = "centralised"
    else:
        kind = "distributed" if high else "none"
    star = sum(max(drawn) - x for x in drawn) / (n - 1)  # Freeman's sum, over that of a star
    return kind, drawn[0], drawn[-1], max(drawn[1:-1]), star


@pytest.mark.parametrize(("kind", "share"), [("llama", 0.12), ("llama", 0.2), ("bert", 0.09)])
def test_is_the_frame_of_the_maps(kind: str, share: float) -> None:
    model = models.tiny(kind, num_hidden_layers=3, attn_implementation="eager")
    text = torch.cat([ids(14, seed) for seed in range(6)])
    with torch.no_grad():
        maps = model(input_ids=text, output_attentions=True).attentions
    frames = found(model, {"input_ids": text[:4]}, {"input_ids": text[4:]}, method=ReferenceFrames(share))
    assert frames.share == share
    for n, frame in frames.layers.items():
        each = [by_hand(row.double(), share) for row in maps[n]]
        assert frame.texts == 6
        for name in FRAMES:
            assert frame.kinds[name] == pytest.approx(sum(kind == name for kind, *_ in each) / 6)
        told = (frame.first, frame.last, frame.between, frame.centralisation)
        for mine, theirs in zip(told, zip(*(numbers for _, *numbers in each), strict=True), strict=True):
            assert mine == pytest.approx(sum(theirs) / 6, rel=1e-5)


class Plant(Method):
    """Lets all queries that may see them give these tokens these weights, and the rest to the first one."""

    paper = METHOD.paper
    weights: tuple[tuple[int, float], ...]

    @at(Site.PATTERN)
    def put(self, pattern: Tensor, call: Call) -> Tensor:
        row = torch.full((20,), 1e-4)
        for place, weight in self.weights:
            row[place] = weight
        return (row / row.sum())[call.cols].expand_as(pattern).to(pattern.dtype)


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        (((0, 1.0),), "centralised"),
        (((7, 1.0),), "centralised"),
        (((19, 1.0),), "centralised"),
        (((0, 0.5), (19, 0.5)), "bidirectional"),
        (((0, 0.5), (19, 0.2), (4, 0.3)), "bidirectional"),
        (((0, 0.5), (18, 0.5)), "distributed"),
        (((1, 0.5), (19, 0.5)), "distributed"),
        (((3, 0.3), (4, 0.3), (5, 0.4)), "distributed"),
        (tuple((n, 0.05) for n in range(20)), "none"),
    ],
)
def test_tells_planted_frames(weights: tuple[tuple[int, float], ...], kind: str) -> None:
    bert = models.tiny("bert")
    with heedful.attach(bert, Plant(weights) | METHOD) as run, torch.no_grad():
        run(input_ids=ids(20))
        seen = run[METHOD]
    assert [frame.kind for frame in seen.layers.values()] == [kind, kind]
    assert seen.kind == kind
    assert str(seen) == f"{kind} frame; by layer 0: {kind}, 1: {kind}"


def test_a_star_is_wholly_central_and_an_even_map_not_at_all() -> None:
    bert = models.tiny("bert")
    for weights, star in ((((2, 1e9),), 1.0), (tuple((n, 1.0) for n in range(20)), 0.0)):
        with heedful.attach(bert, Plant(weights) | METHOD) as run, torch.no_grad():
            run(input_ids=ids(20))
            assert run[METHOD].layers[0].centralisation == pytest.approx(star, abs=1e-6)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    assert same(
        found(model, padded(short, long, left)),
        found(model, {"input_ids": short}, {"input_ids": long}),
    )


@pytest.mark.parametrize("cuts", [(8, 16), (1,), (3, 5, 7)])
def test_tiles_and_pieces_do_not_matter(model, cuts: tuple[int, ...]) -> None:
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


def test_two_tokens_have_nothing_between_them(model) -> None:
    assert found(model, {"input_ids": ids(2)}).layers == {}
    assert same(found(model, {"input_ids": ids(2)}, {"input_ids": ids(3)}), found(model, {"input_ids": ids(3)}))


def test_looks_at_no_other_text() -> None:
    t5 = models.tiny("t5")
    assert len(found(t5, models.tiny_inputs(t5, length=8)).layers) == 4  # of six layers two look across


def frame(first: float, last: float, **kinds: float) -> Frame:
    return Frame(2.0, {kind: kinds.get(kind, 0.0) for kind in FRAMES}, first, last, 0.03, 0.4)


def test_layers_that_share_the_ends_are_one_frame() -> None:
    shared = Frames({0: frame(0.5, 0.0, centralised=1.0), 1: frame(0.0, 0.3, centralised=1.0)}, 0.15)
    assert shared.kind == "bidirectional"
    assert Frames(shared.layers, 0.16).kind == "centralised"
    assert shared.mean("first") == 0.25
    assert shared.mean("centralised") == 1.0
    assert shared.mean("centralisation") == pytest.approx(0.4)


def test_none_is_a_model_s_frame_only_where_there_is_no_other() -> None:
    rare = frame(0.05, 0.0, none=0.75, distributed=0.25)
    assert rare.kind == "none"
    assert Frames({0: rare}, 0.1).kind == "distributed"
    assert Frames({0: frame(0.05, 0.0, none=1.0)}, 0.1).kind == "none"


def test_tells_what_a_reader_wants_to_know() -> None:
    seen = {0: frame(0.05, 0.01, none=0.75, centralised=0.25), 3: frame(0.55, 0.03, centralised=1.0)}
    told = METHOD.describe(Frames(seen, 0.1))
    ends, kinds = told.figures
    assert list(ends.x) == [0, 3]
    assert torch.equal(ends.lines["first token"], torch.tensor([0.05, 0.55]))
    assert torch.equal(ends.lines["last token"], torch.tensor([0.01, 0.03]))
    assert torch.equal(ends.lines["highest between"], torch.tensor([0.03, 0.03]))
    assert torch.equal(kinds.lines["none"], torch.tensor([0.75, 0.0]))
    assert told.findings[0].text == (
        "The frame of reference is centralised: over layers the first token draws 30% of attention and the last one "
        "2%; 62% of texts have some frame in a layer."
    )
    nothing = METHOD.describe(Frames({0: frame(0.05, 0.01, none=1.0)}, 0.1)).findings[0]
    assert nothing.text == "No frame of reference: no token draws 10% of the attention in a text."
    assert nothing.weight < told.findings[0].weight
    assert not METHOD.describe(Frames({}, 0.1)).figures


@pytest.mark.parametrize("bad", [0.0, -0.1, 0.51])
def test_says_what_is_wrong(bad: float) -> None:
    with pytest.raises(FieldError, match=r"share = .*above 0, and 0.5 at most"):
        ReferenceFrames(bad)
    assert ReferenceFrames(0.5).share == 0.5


def test_a_text_too_short_for_a_frame_is_told_as_none(model) -> None:
    frames = found(model, {"input_ids": ids(2)})
    assert frames.layers == {}
    assert str(frames).startswith("none frame")


def test_a_share_is_reached_where_it_is_met() -> None:
    counted = ReferenceFrames(share=0.25)._counted(torch.ones(1, 4), torch.tensor([[4]]))
    assert counted[1:5].tolist() == [0, 1, 0, 0]
