"""AttentionViz against queries and keys of a model written out, moved and compared pair by pair."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close_model
from heedful.core.call import Phase
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.stats import Cat
from heedful.methods.explain.attention_viz import AttentionViz, JointEmbedding
from tests import readers
from tests.by_hand import llama_states
from tests.readers import ids, padded

METHOD = AttentionViz(9)
found = partial(readers.found, method=METHOD)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=2)


def by_hand(model, text: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of each layer, turned, `[h n d]`."""
    kept = {}

    def attend(layer, q, k, v, rotate):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        kept[layer] = rotate(q)[0], rotate(k)[0]
        scores = rotate(q) @ rotate(k).mT / q.shape[-1] ** 0.5
        n = scores.shape[-1]
        return scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1) @ v

    with torch.no_grad():
        llama_states(model, text, attend)
    return kept


def pearson(pairs: list[tuple[float, float]]) -> float:
    return statistics.correlation([a for a, _ in pairs], [b for _, b in pairs])


def pairs_of(q: torch.Tensor, k: torch.Tensor, t: torch.Tensor, c: float) -> list[tuple[float, float]]:
    """Product and distance of every query and key of one head's text, a key never behind its query."""
    out = []
    for i in range(len(q)):
        for j in range(i + 1):
            a, b = [float(x) * c for x in q[i]], [(float(x) + float(y)) / c for x, y in zip(k[j], t, strict=True)]
            out.append((sum(x * y for x, y in zip(a, b, strict=True)), math.dist(a, b)))
    return out


def test_keeps_the_first_tokens_of_every_text(model) -> None:
    texts = [ids(12, 1), ids(7, 2)]
    got = found(model, *({"input_ids": text} for text in texts))
    for n, text in enumerate(texts):
        for layer, (q, k) in by_hand(model, text).items():
            assert close_model(got.texts[layer][n].float(), torch.stack([q, k])[:, :, :9])
    assert [x.shape for x in got.texts[1]] == [(2, 4, 9, 8), (2, 4, 7, 8)]


def test_keys_move_to_the_queries_and_the_best_scale_is_taken() -> None:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randn(2, 3, n, 4, generator=draw, dtype=torch.float64) for n in (6, 5)]
    for text in texts:
        text[1] = 3 * text[1] + 2  # keys longer than queries, and elsewhere
        text[0, 1] *= 40
    got = METHOD.answer(Readings({4: Cat({str(n): text for n, text in enumerate(texts)})}))
    tried = [2 ** (i / 4) for i in range(-16, 17)]
    for h in range(3):
        q, k = ([row for text in texts for row in text[side, h].tolist()] for side in (0, 1))
        t = [
            statistics.fmean(a) - statistics.fmean(b)
            for a, b in zip(zip(*q, strict=True), zip(*k, strict=True), strict=True)
        ]
        assert got.shift[4][h, 0].tolist() == pytest.approx(t)

        def correlation(t: list[float], c: float, h: int = h) -> float:
            return pearson([pair for text in texts for pair in pairs_of(text[0, h], text[1, h], t, c)])

        by_scale = {c: correlation(t, c) for c in tried}
        best = min(by_scale, key=by_scale.__getitem__)
        assert float(got.scale[4][h]) == pytest.approx(best)
        assert float(got.joint[0, h]) == pytest.approx(by_scale[best])
        assert float(got.raw[0, h]) == pytest.approx(correlation([0.0] * 4, 1.0))
        assert tried[0] < best < tried[-1]
    assert len(set(got.scale[4].flatten().tolist())) > 1


def test_no_weight_changes(model) -> None:
    text = ids(9, 3)
    got = found(model, {"input_ids": text})
    for layer, (q, k) in by_hand(model, text).items():
        moved, there = got.embed(layer, q.double(), k.double())
        hidden = ~torch.ones(9, 9).tril().bool()
        plain, joint = (
            (a.float() @ b.float().mT).masked_fill(hidden, -torch.inf).softmax(-1) for a, b in ((q, k), (moved, there))
        )
        assert close_model(joint, plain)
        centres = moved.mean(1) / got.scale[layer][:, 0] ** 2, there.mean(1)  # one and the same but for the scale
        assert close_model(*(x.float() for x in centres))


def test_the_plane_holds_what_spreads_most() -> None:
    line = torch.tensor([[0.0, 0, 0], [3, 0, 0], [6, 0, 0.5]], dtype=torch.float64)
    texts = {0: [torch.stack([line, line.flip(0) + torch.tensor([0, 1.0, 0])])[:, None]]}
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    queries, keys = JointEmbedding(texts, {0: 0 * one}, {0: one}, one[0], one[0]).plane(0, 0)
    assert queries.shape == keys.shape == (3, 2)
    both = torch.cat([queries, keys])
    assert both.mean(0).tolist() == pytest.approx([0, 0])
    assert float(both.var(0)[0]) > 5 * float(both.var(0)[1])
    assert [abs(float(x)) for x in (queries[2] - queries[0])] == pytest.approx([6.0, 0.0], abs=0.3)
    assert abs(float(keys.mean(0)[1] - queries.mean(0)[1])) == pytest.approx(1.0, abs=0.1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(6, 1), ids(11, 2)
    both = padded(short, long, left)
    if left:
        both["position_ids"] = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, both)
    for mine, theirs in zip(together.texts[1], apart.texts[1], strict=True):
        assert close_model(mine.float(), theirs.float())


def test_a_later_piece_counts_its_own_tokens_and_some_heads_alone_can_be_read(model) -> None:
    some = METHOD.on(heads=[2, 3])
    with attach(model, some) as run, torch.no_grad():
        out = run(input_ids=ids(10, 3)[:, :6], use_cache=True)
        run(input_ids=ids(10, 3)[:, 6:], **{CACHE: out[CACHE]}, use_cache=True)
        pieces = run[some]
    q, k = by_hand(model, ids(10, 3))[1]
    for got, where in zip(pieces.texts[1], (slice(0, 6), slice(6, 10)), strict=True):
        assert close_model(got.float(), torch.stack([q, k])[:, 2:, where])


def test_it_says_what_it_found() -> None:
    raw, joint = torch.tensor([[-0.1, 0.2], [0.0, -0.2]]), torch.tensor([[-0.5, float("nan")], [-0.25, -0.75]])
    answer = JointEmbedding({3: [], 5: []}, {}, {}, raw, joint)
    told = METHOD.describe(answer)
    assert [(f.key, f.layers, f.low, f.high) for f in told.figures] == [
        ("joint-embedding", [3, 5], -1, 1), ("raw-embedding", [3, 5], -1, 1),
    ]  # fmt: skip
    assert told.figures[0].values is joint
    assert told.figures[1].values is raw
    assert "in head 5.1 (correlation -0.75); over all heads it is -0.50, and -0.03 before" in told.findings[0].text
    assert str(JointEmbedding({}, {}, {}, raw, -raw)).endswith("0.03 on the mean over heads, -0.03 as they were")


def test_what_it_leaves_alone() -> None:
    call = Bare().call
    assert METHOD.idle(replace(call, phase=Phase.DECODE))
    assert METHOD.idle(replace(call, cross=True))
    assert not METHOD.idle(call)
    assert AttentionViz().tokens == 64
    assert AttentionViz(3).tokens == 3
    with pytest.raises(FieldError, match=r"tokens = 2: must be 3 or more"):
        AttentionViz(2)
