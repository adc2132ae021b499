"""Retrieval scores against dense maps, with padding and several needles, and the prompts that they are taken on."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import heedful
from heedful import catalogue, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.observe.retrieval_heads import Retrieval, RetrievalHeads
from tests import readers
from tests.readers import ids, padded

METHOD = RetrievalHeads()
WORDS = torch.arange(3, 127)
ROLES = {"needle": ((0, 4), (5, 8), (2, 5)), "answer": ((6, 10), (11, 14), (16, 19))}
found = partial(readers.found, method=METHOD, roles=ROLES)


def by_hand(maps: Tensor) -> Tensor:
    hits = torch.zeros(maps.shape[1])
    asked = 0
    for text in maps:
        for (start, _), (first, last) in zip(ROLES["needle"], ROLES["answer"], strict=True):
            for i in range(last - first):
                asked += 1
                hits += text[:, first + i - 1].argmax(-1) == start + i  # the query that gives the answer's token i
    return hits / asked


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_what_the_maps_say(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    inputs = models.tiny_inputs(model, batch=8, length=20)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    scores = found(model, inputs)
    assert 0 < scores.map.mean() < 1
    for layer, x in enumerate(maps):
        assert close(scores.score[layer].float(), by_hand(x))


def test_an_answer_is_as_long_as_its_needle() -> None:
    model = models.tiny("llama")
    inputs = {"input_ids": ids(20)}
    short = found(model, inputs, roles={"needle": ((2, 4),), "answer": ((12, 14),)})
    assert close(found(model, inputs, roles={"needle": ((2, 4),), "answer": ((12, 19),)}).map, short.map)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    model = models.tiny("llama")
    short, long = ids(14, 1), ids(20, 2)  # the short text ends before the last answer
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    assert close(found(model, padded(short, long, left)).map, apart.map)


def test_tiles_pieces_and_decoding_do_not_matter() -> None:
    model = models.tiny("llama")
    whole = found(model, {"input_ids": ids(20)}).map
    assert whole.sum() > 0
    assert close(found(model, {"input_ids": ids(20)}, tile_rows=3, backend="tiled").map, whole)
    with heedful.attach(model, METHOD, roles=ROLES) as run, torch.no_grad():
        cache = run(input_ids=ids(20)[:, :7], use_cache=True)[CACHE]
        run(input_ids=ids(20)[:, 7:], **{CACHE: cache}, use_cache=True)
    assert close(run[METHOD].map, whole)
    later = {"needle": (*ROLES["needle"], (3, 9)), "answer": (*ROLES["answer"], (21, 27))}
    with heedful.attach(model, METHOD, roles=later) as run:
        run.generate(input_ids=ids(20), max_new_tokens=4, do_sample=False)
    assert close(run[METHOD].map, whole)


def test_every_text_may_have_its_own_needles() -> None:
    model = models.tiny("llama")
    each = [{name: spans[i : i + 2] for name, spans in ROLES.items()} for i in (0, 1)]
    alone = [found(model, {"input_ids": ids(20, seed)}, roles=roles).map for seed, roles in enumerate(each)]
    both = found(model, {"input_ids": torch.cat([ids(20, 0), ids(20, 1)])}, roles=each).map
    asked = [sum(stop - start for start, stop in roles["needle"]) for roles in each]
    assert not close(alone[0], alone[1])
    assert close(both, (asked[0] * alone[0] + asked[1] * alone[1]) / sum(asked))


def test_reads_nothing_without_its_spans() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, METHOD, roles={"needle": ((0, 4),)}) as run:
        run(input_ids=ids(20))
        assert not run.state.statistics
    nowhere = found(model, {"input_ids": ids(5)})
    assert nowhere.map.isnan().all()
    assert METHOD.describe(nowhere).findings == ()


def test_draws_needles_that_come_again() -> None:
    method = RetrievalHeads(size=6, cue=2, length=40, depths=(0.0, 1.0), texts=3)
    (probe,) = method.probes(WORDS, 512)
    assert [roles["needle"] for roles in probe.roles] == 3 * [((2, 8),)] + 3 * [((26, 32),)]
    assert probe.tokens.shape == (6, 40)
    for row, roles in zip(probe.tokens, probe.roles, strict=True):
        ((start, stop),), ((first, last),) = roles["needle"], roles["answer"]
        assert (first, last) == (34, 40)
        assert torch.equal(row[start - 2 : stop], row[first - 2 : last])
        assert len(set(row[start - 2 : stop].tolist())) == 8
    assert len({tuple(row.tolist()) for row in probe.tokens}) == 6
    assert set(probe.tokens.flatten().tolist()) <= set(WORDS.tolist())
    assert torch.equal(next(iter(method.probes(WORDS, 512))).tokens, probe.tokens)
    assert next(iter(method.probes(WORDS, 20))).tokens.shape == (6, 20)
    assert list(method.probes(WORDS, 15)) == []
    assert list(method.probes(WORDS[:7], 512)) == []


def test_needles_of_all_depths_share_a_prompt_where_they_fit() -> None:
    method = RetrievalHeads(size=6, cue=2, length=60, depths=(1.0, 0.0, 0.5), texts=2, together=True)
    (probe,) = method.probes(WORDS, 512)
    assert probe.tokens.shape == (2, 60)
    needles = ((2, 8), (16, 22), (30, 36))  # 12 tokens lie around three blocks of 8, and as many blocks follow
    for row, roles in zip(probe.tokens, probe.roles, strict=True):
        assert roles == {"needle": needles, "answer": ((38, 44), (46, 52), (54, 60))}
        for (start, stop), (first, last) in zip(roles["needle"], roles["answer"], strict=True):
            assert torch.equal(row[start - 2 : stop], row[first - 2 : last])
        assert len(set(row[36:].tolist())) == 24, "no token is of two needles"
    apart = next(iter(replace(method, together=False).probes(WORDS, 47)))
    (shorter,) = method.probes(WORDS, 47)
    assert torch.equal(shorter.tokens, apart.tokens)
    assert shorter.roles == apart.roles


def test_finds_the_fetching_heads_of_a_trained_model(default_model: models.Loaded) -> None:
    method = RetrievalHeads(length=96, depths=(0.3,), texts=1)
    (probe,) = method.probes(torch.arange(1000, 40000), 512)
    scores = found(default_model.model, {"input_ids": probe.tokens}, roles=probe.roles, method=method)
    assert next(iter(scores.heads(0.5).values())) > 0.8
    assert 0.01 < len(scores.heads(method.threshold)) / scores.map.numel() < 0.2  # few, but some


def test_tells_what_a_reader_wants_to_know() -> None:
    rows = torch.tensor([[0.0, 0.05, 0.1, 0.0], [0.5, 0.0, 0.9, 0.0]], dtype=torch.float64)
    scores = Retrieval({0: rows[0], 4: rows[1]})
    told = METHOD.describe(scores)
    assert told.figures[0].layers == [0, 4]
    assert torch.equal(told.figures[0].values, scores.map)
    assert list(told.roles[0].heads) == [(4, 2), (4, 0)]
    (finding,) = told.findings
    assert finding.text.startswith(
        "25% of heads are retrieval heads, which fetch text from far back, above all heads 4.2 (90"
    )
    assert set(finding.methods) <= set(catalogue.entries())
    assert finding.weight == pytest.approx(0.3 + 0.4 * 0.9)
    (none,) = METHOD.describe(Retrieval({0: torch.zeros(4)})).findings
    assert (none.text, none.weight) == ("No retrieval head: none fetches text from far back.", 0.1)
    assert "4.2: 90%" in str(scores)


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", 0), ("cue", 0), ("texts", 0), ("length", 39), ("depths", ()), ("depths", (1.5,)), ("threshold", 1.0)],
)
def test_says_what_is_wrong(name: str, value: object) -> None:
    with pytest.raises(FieldError, match=name):
        RetrievalHeads(**{name: value})


def test_layers_of_unlike_width_have_one_map() -> None:
    found = Retrieval({0: torch.tensor([0.5, 0.25]), 1: torch.tensor([1.0, 0.0, 0.75])}).map
    assert found.nan_to_num(-1.0).tolist() == [[0.5, 0.25, -1.0], [1.0, 0.0, 0.75]]


def test_needles_share_a_prompt_that_just_holds_them() -> None:
    method = RetrievalHeads(length=120, together=True)  # three needles of 16 with cues of 4, and their answers
    (probe,) = method.probes(torch.arange(1000), 120)
    assert probe.tokens.shape == (1, 120)
    assert len(probe.roles[0]["needle"]) == 3  # type: ignore[index]
