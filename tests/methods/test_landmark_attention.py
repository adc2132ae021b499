"""LandmarkAttention: weights of every row by the paper's two softmaxes, in loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.positions import Positions
from heedful.kit.chosen import Chosen
from heedful.methods.mechanisms.normalise.landmark_attention import LandmarkAttention, _highest
from tests.by_hand import heads_of, llama_states

MARK = 9
PADDED = torch.arange(19)[None] >= torch.tensor([[0], [5]])


def softmax(found: dict[int, Tensor]) -> dict[int, Tensor]:
    total = sum(torch.exp(x) for x in found.values())
    return {j: torch.exp(x) / total for j, x in found.items()}


def row(scores: Tensor, marks: list[bool], i: int, blocks: int | None = None) -> Tensor:
    """The weights of query i on all keys, which are a text's; `marks` are its landmarks."""
    number = [sum(marks[:j]) for j in range(len(marks))]  # landmarks before a token tell its block
    out = torch.zeros(len(marks), dtype=scores.dtype)
    chosen = [j for j in range(i) if marks[j] and number[j] < number[i]]
    if blocks is not None:
        chosen = sorted(chosen, key=lambda j: -float(scores[j]))[:blocks]
    own = [j for j in range(i + 1) if number[j] == number[i] and not marks[j]]
    first = softmax({j: scores[j] for j in (*own, *chosen)})
    for j in own:
        out[j] = first[j]
    for mark in chosen:
        inside = softmax({j: scores[j] for j in range(mark) if number[j] == number[mark]})
        for j, weight in inside.items():
            out[j] = first[mark] * weight
    return out


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("blocks", [None, 0, 1, 2])
@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
def test_every_fourth_token(backend: str, blocks: int | None, text: Tensor | None) -> None:
    bare = Bare(text=text)
    method = LandmarkAttention(4, blocks=blocks)
    heads, _ = bare.run(method, backend, tile_rows=7 if backend == "tiled" else None)
    for b, pad in enumerate((0, 0 if text is None else 5)):
        n = 19 - pad
        marks = [j % 4 == 3 for j in range(n)]
        for h in range(4):
            q, k, v = bare.q[b, h, pad:], bare.k[b, h // 2, pad:], bare.v[b, h // 2, pad:]
            for i in range(n):
                wanted = row(q[i].double() @ k.double().T / math.sqrt(8), marks, i, blocks)
                assert close(heads[b, h, pad + i], (wanted @ v.double()).float()), (b, h, i)


def test_of_texts_that_share_columns_each_has_blocks_of_its_own() -> None:
    """Of the four columns that all queries see one text has two blocks, the other its first, which a landmark ends."""
    bare, seen = Bare(text=PADDED), torch.isin(torch.arange(19), torch.arange(5, 9))
    rule = Chosen(lambda rows: seen.expand(1, 1, 19, 19)[:, :, rows])
    bare.call = replace(bare.call, mask=bare.call.mask & rule)
    narrow, whole = (bare.run(LandmarkAttention(4), backend, 1)[0] for backend in ("tiled", "reference"))
    assert close(narrow[:, :, 5:], whole[:, :, 5:])


def by_hand(ids: list[int], i: int, scores: Tensor) -> Tensor:
    return row(scores, [token == MARK for token in ids], i)


@pytest.mark.parametrize("cut", [None, 5])
def test_landmark_tokens(cut: int | None) -> None:
    """They end blocks wherever they stand, also in a text that goes on; the last layer's weights are compared."""
    ids = [5, MARK, MARK, 3, 4, 6, MARK, 7, 3, MARK, 5, 8]
    model = models.tiny("llama")

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Any) -> Tensor:
        q, k = turn(q), turn(k).repeat_interleave(2, 1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        maps = [torch.stack([by_hand(ids, i, scores[0, h, i]) for i in range(len(ids))]) for h in range(4)]
        return heads_of(torch.stack(maps)[None], v)

    with torch.no_grad():
        wanted = model.lm_head(llama_states(model, torch.tensor([ids]), attend))
        with attach(model, LandmarkAttention(tokens=(MARK, 99))) as run:
            whole = torch.tensor([ids])
            if cut is None:
                found = run(whole).logits
            else:
                cache = DynamicCache()
                parts = [run(whole[:, :cut], **{CACHE: cache}).logits]
                parts += [run(whole[:, i : i + 1], **{CACHE: cache}).logits for i in range(cut, len(ids))]
                found = torch.cat(parts, 1)
    assert close_model(found, wanted)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_each_text_has_its_own_landmark_tokens(backend: str) -> None:
    texts = [[5, 3, MARK, 3, 4, MARK, 7, 8], [MARK, 5, 8, 6, MARK, 3]]
    model = models.tiny("llama")
    ids = torch.tensor([texts[0], [0, 0, *texts[1]]])
    mask = torch.tensor([[1] * 8, [0] * 2 + [1] * 6])
    method = LandmarkAttention(tokens=(MARK,))
    with torch.no_grad(), attach(model, method, backend=backend) as run:
        both = run(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        for found, text in zip(both, texts, strict=True):
            assert close_model(found[8 - len(text) :], run(torch.tensor([text])).logits[0])


def test_weights_add_up_to_one_and_gradients_reach_landmarks() -> None:
    scores = torch.randn(2, 4, 19, 19, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bare = Bare()
    keep = torch.ones(19, 19, dtype=torch.bool).tril()[None, None]
    weights = LandmarkAttention(4).weigh(scores, replace(bare.call, keep=keep))
    sums = weights.detach().sum(-1)
    assert close(sums, torch.ones_like(sums))
    assert not bool(weights.detach()[..., 3::4].any())
    weights[..., 18, 0].sum().backward()
    grad = scores.grad
    assert grad is not None
    table = torch.zeros(19, dtype=torch.bool)
    table[[0, 1, 2, 3, 7, 11, 15, 16, 17, 18]] = True  # its block, all landmarks, and the query's own block
    assert torch.equal(grad[:, :, 18].ne(0).all(0).all(0), table)


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"LandmarkAttention.every = 1: must be 2 or more"):
        LandmarkAttention(1)
    with pytest.raises(FieldError, match=r"LandmarkAttention.tokens = \(-1,\): each must be 0 or more"):
        LandmarkAttention(tokens=(-1,))
    with pytest.raises(FieldError, match=r"LandmarkAttention.blocks = -1: must be 0 or more, or None"):
        LandmarkAttention(blocks=-1)
    run = attach(models.tiny("llama"), LandmarkAttention(tokens=(MARK,)))
    with pytest.raises(SiteError, match="hand it ids"):
        run(inputs_embeds=torch.randn(1, 5, 32))
    run.close()


def test_of_a_block_that_a_cache_dropped_a_part_of() -> None:
    """What is left of it counts, if its landmark is there; places may be far apart."""
    left = [0, 2, 3, 40, 41, 42, 44, 47, 80, 81]  # of the second block there, the landmark is gone
    index = torch.tensor(left)[None, None]
    scores = torch.randn(1, 1, 1, len(left), generator=torch.Generator().manual_seed(0))
    call = replace(Bare().call, heads=1, queries=Positions.row(81, 1), keys=Positions(index, index), keep=None)
    found = LandmarkAttention(4).weigh(scores, call)[0, 0, 0]
    s = dict(zip(left, scores[0, 0, 0], strict=True))
    first = softmax({j: s[j] for j in (3, 47, 80, 81)})
    inside = softmax({j: s[j] for j in (0, 2)})
    wanted = {80: first[80], 81: first[81], 44: first[47]} | {j: first[3] * x for j, x in inside.items()}
    assert close(found, torch.stack([wanted.get(j, torch.zeros(())) for j in left]))


def test_of_many_equal_landmarks_the_first_are_the_highest() -> None:
    among = torch.arange(40) >= 4
    assert _highest(torch.zeros(1, 40), among, 3)[0].nonzero()[:, 0].tolist() == [4, 5, 6]
