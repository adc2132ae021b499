"""Secondary sinks against brute force over the model's own maps and hidden states, token by token."""

import math
from functools import partial

import pytest
import torch
from transformers import StaticCache

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.core.errors import FieldError
from heedful.methods.observe.secondary_sinks import Level, Secondary, SecondarySinks
from tests import readers
from tests.readers import ids, padded

DEPTH = 6
METHOD = SecondarySinks(near=0.25, least=2, primary=0.9)  # a tiny random model has some tokens on either side
found = partial(readers.found, method=METHOD)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=DEPTH)


def same(a: dict[int, float], b: dict[int, float]) -> bool:
    return list(a) == list(b) and all(a[n] == pytest.approx(b[n], rel=1e-4, nan_ok=True) for n in a)


def test_follows_each_token_through_the_layers() -> None:
    eager = models.tiny("llama", num_hidden_layers=DEPTH, attn_implementation="eager")
    text = torch.cat([ids(20, 1), ids(20, 2), ids(20, 3)])
    with torch.no_grad():
        out = eager(input_ids=text, output_attentions=True, output_hidden_states=True)
    lives: dict[tuple[int, int], int] = {}
    weights: dict[int, list[float]] = {n: [] for n in range(1, DEPTH)}
    norms: dict[int, list[float]] = {n: [] for n in range(1, DEPTH)}
    for row in range(3):
        for t in range(1, 20):
            born = None
            for n in range(DEPTH - 1):  # the state after layer n goes into layer n + 1
                x = out.hidden_states[n + 1][row]
                sink = x[0].norm() > METHOD.primary * x.norm(dim=-1).median()
                if sink and torch.cosine_similarity(x[t], x[0], dim=0).abs() > METHOD.near:
                    born = n if born is None else born
                    weights[n + 1].append(float(out.attentions[n + 1][row, :, t:, t].mean()))
                    norms[n + 1].append(float(x[t].norm()))
                elif born is not None:
                    lives[born, n - born] = lives.get((born, n - born), 0) + 1
                    born = None
            if born is not None:
                lives[born, DEPTH - 1 - born] = lives.get((born, DEPTH - 1 - born), 0) + 1
    sinks = found(eager, {"input_ids": text})
    wanted = {key: number / 3 for key, number in lives.items() if key[1] >= METHOD.least}
    assert {(x.born, x.lasts): x.number for x in sinks.levels} == pytest.approx(wanted)
    numbers = [x.number for x in sinks.levels]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 1
    assert len(wanted) > 2
    assert len(lives) > len(wanted)
    for n in range(1, DEPTH):
        for of, each in ((sinks.weight, weights[n]), (sinks.norm, norms[n])):
            assert of[n] == pytest.approx(sum(each) / len(each) if each else math.nan, rel=1e-4, nan_ok=True)
        assert sinks.first_weight[n] == pytest.approx(float(out.attentions[n][..., 0].mean()), rel=1e-4)
        assert sinks.first_norm[n] == pytest.approx(float(out.hidden_states[n][:, 0].norm(dim=-1).mean()), rel=1e-4)
        present = [number for (born, lasts), number in wanted.items() if born < n <= born + lasts]
        assert sinks.by_layer[n] == pytest.approx(sum(present))


def test_the_first_token_must_be_a_sink_itself(model) -> None:
    strict = SecondarySinks(near=0.25, least=1, primary=50.0)
    sinks = found(model, {"input_ids": ids(20, 1)}, method=strict)
    assert not sinks.levels
    assert len(strict.describe(sinks).figures) == 1
    assert not strict.describe(sinks).findings


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, padded(short, long, left))
    assert together.levels == apart.levels
    assert apart.levels
    for name in ("weight", "norm", "first_weight", "first_norm"):
        assert same(getattr(together, name), getattr(apart, name))


def test_tiles_do_not_matter(model) -> None:
    inputs = {"input_ids": ids(23, 4)}
    whole = found(model, inputs, backend="reference")
    for rows in (1, 5):
        part = found(model, inputs, backend="tiled", tile_rows=rows)
        assert part.levels == whole.levels
        assert same(part.weight, whole.weight)


def test_a_gap_between_layers_is_not_bridged(model) -> None:
    some = METHOD.on(layers=[0, 1, 3, 4])
    assert list(found(model, {"input_ids": ids(15)}, method=some).counts) == [1, 4]


def read(model, *pieces: torch.Tensor, mask: torch.Tensor | None = None) -> Secondary:
    cache, n = None, 0
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        for piece in pieces:
            n += piece.shape[1]
            inputs = {"input_ids": piece} if mask is None else {"input_ids": piece, "attention_mask": mask[:, :n]}
            cache = run(**inputs, use_cache=True, **{CACHE: cache})[CACHE]
        return run[METHOD]


def equal(a: Secondary, b: Secondary) -> bool:
    names = ("weight", "norm", "first_weight", "first_norm")
    counts = all(torch.allclose(a.counts[n], b.counts[n]) for n in b.counts)
    return counts and all(same(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("cuts", [(8, 16), (1,), (3, 5, 7)])
@pytest.mark.parametrize("padding", [0, 9])
def test_a_text_in_pieces_is_that_text(model, cuts: tuple[int, ...], padding: int) -> None:
    """With padding on the left of one text, whose first pieces are nothing else."""
    text = torch.cat([ids(24, 1), ids(24, 2), ids(24, 3)])
    mask = torch.ones_like(text)
    mask[1, :padding] = 0
    whole = read(model, text, mask=mask if padding else None)
    assert equal(read(model, *text.tensor_split(cuts, dim=1), mask=mask if padding else None), whole)
    assert whole.levels


def test_texts_count_alike_in_batches_of_any_size(model) -> None:
    text = torch.cat([ids(24, seed) for seed in range(4)])
    apart = found(model, {"input_ids": text[:3]}, {"input_ids": text[3:]})
    assert equal(apart, found(model, {"input_ids": text}))


def test_a_cache_with_room_to_spare_holds_the_same_text(model) -> None:
    text, cache = ids(24, 1), StaticCache(config=model.config, max_cache_len=40)
    whole = read(model, text)
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        for piece in text.split(12, dim=1):
            run(input_ids=piece, use_cache=True, **{CACHE: cache})
        assert equal(run[METHOD], whole)


def test_decoding_steps_and_what_follows_are_left_out(model) -> None:
    text = ids(20, 1)
    assert equal(read(model, text[:, :12], text[:, 12:13], text[:, 13:]), read(model, text[:, :12]))


def test_tells_levels_and_what_they_get() -> None:
    counts = {n: torch.zeros(6, dtype=torch.float64) for n in range(1, 6)}
    for n in (2, 3, 4):
        counts[n][1] = 2.0  # arise after layer 1, gone after layer 4
    counts[5][4] = 7.0  # too short to count
    nan = dict.fromkeys(counts, math.nan)
    answer = Secondary(counts, dict.fromkeys(counts, 0.125), nan, dict.fromkeys(counts, 0.5), nan, 2)
    assert answer.levels == [Level(1, 3, 2.0)]
    told = METHOD.describe(answer)
    assert told.findings[0].text == (
        "In layers 2 to 4 there are secondary sinks, tokens beside the first (up to 2.0 a text, layer 2); each gets "
        "12% of the attention there, the first token 50%."
    )
    assert told.figures[2].rows == [(1, 3, 2.0)]


@pytest.mark.parametrize(("field", "bad"), [("near", 1.0), ("least", 0), ("primary", 0.0)])
def test_says_what_is_wrong(field: str, bad: float) -> None:
    with pytest.raises(FieldError, match=field):
        SecondarySinks(**{field: bad})


def test_a_cosine_at_the_threshold_is_not_near() -> None:
    call = Bare(Shape(b=1)).call
    stream = torch.ones(1, 19, 4)  # at a cosine of exactly 1/2 to the first token
    stream[0, 0] = torch.tensor([100.0, 0.0, 0.0, 0.0])
    stream[0, 5] = torch.tensor([-3.0, 1.0, 1.0, 1.0])
    SecondarySinks(near=0.5).align(stream, call)
    _, (born, _, _) = call.state.forward["state"]
    assert (born[0] >= 0).nonzero().flatten().tolist() == [0, 5]
