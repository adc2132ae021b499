"""A mask that the caller gives for each pair of tokens: it tells where padding is, and where texts begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from heedful import attach
from heedful.adapters.arguments import _of_the_other, places_in
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.methods import ACT
from heedful.tiny import tiny

from .samples import PAPER, Narrow, Shares
from .test_checkpointing import by_hand

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
N = IDS.shape[1]
CAUSAL = torch.full((N, N), -1e30).triu(1)
PLACES = torch.stack([(torch.arange(N) - 4).clamp(min=0), torch.arange(N)])


class Placed(Method):
    """Tells a layer where its tokens stand, before there are queries and keys."""

    paper = PAPER

    @at(Site.HIDDEN)
    def tell(self, x: Tensor, call: Call) -> Tensor:
        return x + call.q_pos[:, 0, :, None].sin()


def padded(blind: str) -> Tensor:
    """Four tokens of padding before the first text, which see nothing, themselves, or all."""
    pairs = torch.ones(2, 1, N, N, dtype=torch.bool).tril()
    pairs[0, :, :, :4] = False
    if blind != "nothing":
        pairs[0, :, :4] = torch.eye(N).bool()[:4] | (blind == "all")
    return pairs


@torch.no_grad()
@pytest.mark.parametrize("added", [False, True])  # to scores
@pytest.mark.parametrize("blind", ["nothing", "itself", "all"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_is_none_of_the_text(kind: str, blind: str, added: bool) -> None:
    model, pairs = tiny(kind), padded(blind)
    mask = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min) if added else pairs
    with attach(model, Placed() | Narrow(4) | ACT(0.4) | Shares()) as run:
        alone = run(input_ids=IDS[:1, 4:]).logits
        run.reset()
        run(input_ids=IDS, attention_mask=pairs[:, 0, -1].long(), position_ids=PLACES)
        counted = run[Shares()]
        run.reset()
        found = run(input_ids=IDS, attention_mask=mask, position_ids=PLACES).logits
        assert close_model(found[:1, 4:], alone)
        assert all(close_model(run[Shares()][layer].value, counted[layer].value) for layer in (0, 1))
    with attach(model, Placed() | Narrow(4)) as run:
        first = {"attention_mask": mask[..., :-1, :-1], "position_ids": PLACES[:, :-1]}
        last = {"attention_mask": mask[:, :, -1:], "position_ids": PLACES[:, -1:]}
        cache = run(input_ids=IDS[:, :-1], **first)[CACHE]
        found = run(input_ids=IDS[:, -1:], **last, **{CACHE: cache}).logits
        assert close_model(found[0, -1], run(input_ids=IDS[:1, 4:]).logits[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("blind", ["nothing", "itself", "the text"])
def test_padding_behind_a_text_is_no_other_text(blind: str) -> None:
    model, pairs = tiny("llama"), torch.ones(2, 1, N, N, dtype=torch.bool).tril()
    pairs[0, :, :, 8:] = False
    if blind != "the text":
        pairs[0, :, 8:] = torch.eye(N).bool()[8:] & (blind == "itself")
    with attach(model, Narrow(4) | ACT(0.4)) as run:
        found = run(input_ids=IDS, attention_mask=pairs).logits
        assert close_model(found[:1, :8], run(input_ids=IDS[:1, :8]).logits)
        assert close_model(found[1:], run(input_ids=IDS[1:]).logits)


@torch.no_grad()
def test_a_tree_of_guesses_stands_behind_no_padding() -> None:
    """Its last token has a lower position than it has a number, and sees the first all the same."""
    model, pairs = tiny("llama"), torch.ones(1, 1, 3, 11, dtype=torch.bool)
    pairs[..., 8:] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    with attach(model, Narrow(4)) as run:
        cache = run(input_ids=IDS[:1, :8])[CACHE]
        places = {"attention_mask": pairs, "position_ids": torch.tensor([[8, 9, 9]])}
        found = run(input_ids=IDS[:1, 8:11], **places, **{CACHE: cache}).logits
        assert close_model(found[:, :2], run(input_ids=IDS[:1, :10]).logits[:, 8:])


@torch.no_grad()
def test_a_static_cache_with_more_room_than_tokens_is_no_padding() -> None:
    model, pairs = tiny("llama"), torch.ones(1, 1, N, 16, dtype=torch.bool).tril()
    with attach(model, Narrow(4)) as run:
        cache, found = StaticCache(config=model.config, max_cache_len=16), []
        for part in (slice(0, 8), slice(8, 11), slice(11, N)):
            places = {"attention_mask": pairs[:, :, part], "position_ids": torch.arange(N)[None, part]}
            found.append(run(input_ids=IDS[:1, part], **places, **{CACHE: cache}).logits)
        assert close_model(torch.cat(found, 1), run(input_ids=IDS[:1]).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_mask_of_an_encoder_tells_its_decoder_nothing(kind: str) -> None:
    model, own = tiny(kind), (0, 1, 2, 4)  # self attention
    text = torch.ones(1, N, dtype=torch.long)
    text[:, :4] = 0
    pairs = {"attention_mask": text[:, None, None].expand(1, 1, N, N).bool()}
    pairs["decoder_attention_mask"] = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    added = {
        name: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) for name, mask in pairs.items()
    }
    given = {"input_ids": IDS[:1], "decoder_input_ids": IDS[1:]}
    with attach(model, Narrow(4).on(layers=own)) as run:
        found = run(**given, **added).logits
        assert close_model(found, run(**given, attention_mask=text).logits)


def spread(text: Tensor) -> Tensor:
    """A mask of padding `[b m]` as one of pairs, as it is added to scores."""
    pairs = text[:, None, None].bool().expand(-1, 1, N, -1)
    return torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)


class PlacedKeys(Method):
    """Tells a layer where its keys stand, if it is known which of them are padding."""

    paper = PAPER

    @at(Site.SCORES)
    def tell(self, scores: Tensor, call: Call) -> Tensor:
        return scores if call.mask.padding is None else scores + call.distance.cos()


@torch.no_grad()
@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_cross_attention_is_told_of_an_encoders_padding(kind: str, hole: bool) -> None:
    model, text = tiny(kind), torch.ones(2, N, dtype=torch.long)
    text[0, :4] = 0
    text[1, 5:7] = int(not hole)
    given = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    with attach(model, PlacedKeys().on(layers=(3, 5))) as run:
        wanted = run(**given, attention_mask=text).logits
        assert close_model(run(**given, attention_mask=spread(text)).logits, wanted)
    assert not close_model(model(**given, attention_mask=text).logits, wanted)


def test_where_keys_stand_is_known_where_queries_see_unlike_ones() -> None:
    table = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    table[..., :2] = False
    keys, mask = _of_the_other(table, 2)
    assert keys.position[:, 0].tolist() == [[-2, -1, 0, 1, 2]] * 2
    assert mask.padding is not None
    table[..., 0, [2, 4]] = False  # which other queries see
    keys, mask = _of_the_other(table, 2)
    assert keys.position[:, 0].tolist() == [[-2, -1, 0, 1, 2]] * 2
    assert mask.padding is None
    assert torch.equal(mask.rules[0].table, table)  # type: ignore[attr-defined]


def test_keys_that_no_row_sees_may_be_behind_a_window() -> None:
    table = torch.ones(2, 1, 3, 8, dtype=torch.bool)
    table[0, ..., :2] = False
    table[0, 0, 1, 2] = False  # which other queries see
    places = places_in(table, None)
    assert places is not None
    assert places.position[:, 0, 0].tolist() == [-2, 0]
    table[1, ..., :3] = False
    assert places_in(table, None) is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_padding_stays_where_it_was_when_more_is_read(kind: str) -> None:
    """Without position ids, by which the mask of a later call could be told from one of a window."""
    model, text = tiny(kind), torch.ones(2, N, dtype=torch.long)
    text[0, :3] = 0
    two = kind != "llama"
    name, ids = ("decoder_attention_mask", "decoder_input_ids") if two else ("attention_mask", "input_ids")
    more = {"input_ids": IDS} if two else {}
    found = {}
    for pairs in (False, True):
        with attach(model, Placed()) as run:
            cache, out = None, []
            for start, stop in ((0, 7), (7, 11), (11, N)):
                mask = (spread(text)[:, :, start:stop, :stop] + CAUSAL[start:stop, :stop]) if pairs else text[:, :stop]
                out.append(run(**more, **{ids: IDS[:, start:stop], name: mask, CACHE: cache, "use_cache": True}))
                cache = out[-1][CACHE]
            found[pairs] = torch.cat([each.logits for each in out], 1)
    assert close_model(found[True][0, 3:], found[False][0, 3:])
    assert close_model(found[True][1], found[False][1])


@torch.no_grad()
def test_texts_are_kept_apart() -> None:
    model = tiny("llama")
    pairs = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    pairs[..., 5:, :5] = False
    with attach(model, Narrow(4)) as run:
        found = run(input_ids=IDS[:1], attention_mask=pairs).logits
        for part in (slice(0, 5), slice(5, None)):
            assert close_model(found[:, part], run(input_ids=IDS[:1, part]).logits)
    with pytest.raises(SiteError, match="several are packed into one row"), attach(model, ACT(0.4)) as run:
        run(input_ids=IDS[:1], attention_mask=pairs)


@torch.no_grad()
def test_one_for_each_kind_of_layer() -> None:
    model, pairs = tiny("gemma2"), padded("nothing")
    masks = {"sliding_attention": pairs & ~torch.ones(N, N, dtype=torch.bool).tril(-4), "full_attention": pairs}
    added = {
        kind: torch.zeros(pairs.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        for kind, mask in masks.items()
    }
    with attach(model, Narrow(3)) as run:
        found = run(input_ids=IDS, attention_mask=added).logits
        assert close_model(found[:1, 4:], run(input_ids=IDS[:1, 4:]).logits)
        assert close_model(found[1:], run(input_ids=IDS[1:]).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_stands_where_it_stood(reentrant: bool) -> None:
    given = {"input_ids": IDS, "attention_mask": padded("nothing"), "position_ids": PLACES, "labels": IDS}

    def gradients(model: Any) -> list[Tensor]:
        with attach(model, Narrow(4)) as run:
            run(**given, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted, found = gradients(tiny("llama").train()), gradients(by_hand(reentrant))
    assert all(close_model(x, want) for x, want in zip(found, wanted, strict=True))
