"""EfficientDLM against which pairs of tokens may meet, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError
from heedful.conformance.tolerances import close_model
from heedful.core.errors import InactiveWarning, SiteError
from heedful.methods import EfficientDLM
from tests.by_hand import causal_map, heads_of, in_pieces, llama_states, turning

N = 12
IDS = torch.randint(3, 100, (2, N), generator=torch.Generator().manual_seed(1))


def _logits(model: Any, ids: Tensor, seen: Callable[[int, int], bool]) -> Tensor:
    states = llama_states(model, ids, lambda _, q, k, v, turn: heads_of(causal_map(turn(q), turn(k), seen), v))
    out: Tensor = model.lm_head(states)
    return out


def _noisy(copy: int, size: int) -> Callable[[int, int], bool]:
    """What a token of `copy` noisy ones, or of as many clean ones behind them, sees."""

    def seen(i: int, j: int) -> bool:
        mine, other = (i % copy) // size, (j % copy) // size
        if j < copy:
            return i < copy and mine == other
        return other < mine or (i >= copy and mine == other)

    return seen


@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_tokens_see_their_block_and_those_before(size: int) -> None:
    model = models.tiny("llama")
    with attach(model, EfficientDLM(size)) as run, torch.no_grad():
        found = run(IDS).logits
        assert close_model(found, _logits(model, IDS, lambda i, j: j // size <= i // size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_noisy_blocks_see_themselves_and_the_clean_ones_before(size: int) -> None:
    model: Any = models.tiny("llama")
    place = torch.arange(6).repeat(2)[None]
    turned = turning(model, place)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        return heads_of(causal_map(turned(q), turned(k), _noisy(6, size)), v)

    want = model.lm_head(llama_states(model, IDS, attend))
    with attach(model, EfficientDLM(size, "copied"), roles={"copied": ((0, 6),)}) as run, torch.no_grad():
        given = {"attention_mask": torch.ones_like(IDS), "position_ids": place.expand(2, -1)}
        assert close_model(run(IDS, **given).logits, want)
        one = EfficientDLM(1, "copied")
    with attach(model, one, roles={"copied": ((0, 6),)}) as run:
        assert float(run.difference(input_ids=IDS, **given)) > 0


def test_what_is_done_may_be_cached_block_by_block() -> None:
    model = models.tiny("llama").eval()
    with attach(model, EfficientDLM(4)) as run, torch.no_grad():
        assert close_model(in_pieces(run, IDS, (8, 4))[0], run(IDS).logits)
        assert not close_model(in_pieces(run, IDS, (6, 6))[0], run(IDS).logits)


def test_padding_is_no_part_of_a_block() -> None:
    model = models.tiny("llama")
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (padded > 0).long()
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with attach(model, EfficientDLM(4)) as run, torch.no_grad():
        found = run(padded, attention_mask=mask, position_ids=place).logits[:, 3:]
        assert close_model(found, run(IDS).logits)


def test_an_encoder_decoders_source_is_left_alone() -> None:
    model = models.tiny("bart")
    only = ("model.decoder.layers.0.encoder_attn",)
    quiet = pytest.warns(InactiveWarning, match="changed nothing")
    with quiet, attach(model, EfficientDLM(2), only=only) as run:
        assert float(run.difference(input_ids=IDS, decoder_input_ids=IDS[:, :5])) == 0


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"EfficientDLM.block = 0: must be 1 or more"):
        EfficientDLM(0)
    with pytest.raises(FieldError, match=r"EfficientDLM.noisy = '': must name a role"):
        EfficientDLM(noisy="")
    model, twice = models.tiny("llama"), torch.arange(6).repeat(2).expand(2, -1)
    with attach(model, EfficientDLM(2)) as run:
        run(IDS)
        with pytest.raises(SiteError, match=r"several are packed into one row.*name the first of two copies 'noisy'"):
            run(IDS, position_ids=twice, use_cache=False)
    for spans, place in (
        (((2, 6),), twice),
        (((0, 4), (4, 6)), twice),
        (((0, 12),), twice),
        (((0, 5),), twice),
        (((0, 6),), torch.arange(N).expand(2, -1)),
        (((0, 6),), twice + 1),
    ):
        with (
            pytest.raises(FieldError, match="'noisy' names the first half of a row"),
            attach(model, EfficientDLM(2), roles={"noisy": spans}) as run,
        ):
            run(IDS, attention_mask=torch.ones_like(IDS), position_ids=place)
