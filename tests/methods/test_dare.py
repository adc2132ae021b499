"""DARE against scores looked up pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer
from heedful.conformance.tolerances import close_model
from heedful.methods import DARE
from tests.by_hand import in_pieces, llama_states

N, WORDS, W = 9, 100, 3
IDS = torch.randint(3, WORDS, (2, N), generator=torch.Generator().manual_seed(1))


def _logits(model: Any, tables: list[Tensor], ids: Tensor = IDS) -> Tensor:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        texts = []
        for row, values in zip(ids.tolist(), v, strict=True):
            heads = []
            for h in range(q.shape[1]):
                table, value = tables[layer][h // 2], values[h // 2]
                out = []
                for i in range(len(row)):
                    scores = [table[row[i]] @ table[row[j]] / W**0.5 for j in range(i + 1)]
                    weights = torch.stack(scores).softmax(0)
                    out.append(sum(weights[j] * value[j] for j in range(i + 1)))
                heads.append(torch.stack(out))
            texts.append(torch.stack(heads))
        return torch.stack(texts)

    out: Tensor = model.lm_head(llama_states(model, ids, attend))
    return out


def test_the_first_steps_loss_and_gradient() -> None:
    model = models.tiny("llama")
    with attach(model, DARE(WORDS, W)) as run:
        mine = [p.detach().clone().requires_grad_() for p in run.parameters()]
        logits = _logits(model, mine)
        assert close_model(run(IDS).logits, logits)
        want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        found = run(IDS, labels=IDS, use_cache=False).loss
        found.backward()
        assert close_model(found.detach(), want.detach())
        for p, slope in zip(run.parameters(), torch.autograd.grad(want, mine), strict=True):
            assert bool(slope.any())
            assert close_model(p.grad, slope)


def test_a_cache_goes_on_and_padding_counts_for_nothing() -> None:
    model = models.tiny("llama").eval()
    with attach(model, DARE(WORDS, W)) as run, torch.no_grad():
        whole = run(IDS).logits
        assert close_model(in_pieces(run, IDS, (4, 1, 4))[0], whole)
        padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], 1)
        mask = (padded > 0).long()
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        assert close_model(run(padded, attention_mask=mask, position_ids=place).logits[:, 2:], whole)


def test_another_sequence_is_left_alone() -> None:
    model = models.tiny("bart")
    only = ("model.decoder.layers.0.encoder_attn",)
    with pytest.warns(UserWarning, match="changed nothing"), attach(model, DARE(WORDS, W), only=only) as run:
        assert float(run.difference(input_ids=IDS, decoder_input_ids=IDS[:, :5])) == 0


def test_the_start() -> None:
    layer = Layer(1, 4, 2, 8, 6, 40)
    found = DARE(500, 8, 0.5).parameters(layer)["table"]
    assert tuple(found.shape) == (2, 500, 8)
    assert 0.48 < float(found.std()) < 0.52
    assert torch.equal(found, DARE(500, 8, 0.5).parameters(layer)["table"])
    assert not torch.equal(found, DARE(500, 8, 0.5).parameters(Layer(0, 4, 2, 8, 6, 40))["table"])
    assert 0.9 < float(DARE(500).parameters(layer)["table"].std()) < 1.1


def test_errors() -> None:
    for settings in ({"vocabulary": 0}, {"vocabulary": 9, "width": 0}):
        with pytest.raises(FieldError, match=r"DARE\..* = 0: must be 1 or more"):
            DARE(**settings)
    for spread in (-1.0, float("inf")):
        with pytest.raises(FieldError, match=r"DARE.spread = .*: must be 0 or more"):
            DARE(9, spread=spread)
    assert not bool(DARE(9, 1, 0.0).parameters(Layer(0, 1, 1, 8, 8, 8))["table"].any())
    with pytest.raises(FieldError, match=r"DARE.width = 9: must be no more than a head is wide"):
        DARE(9, 9).parameters(Layer(0, 1, 1, 8, 8, 8))
    model, most = models.tiny("llama"), int(IDS.max())
    with attach(model, DARE(most + 1, W)) as run:
        run(IDS)
    rule = rf"DARE.vocabulary = {most}: must be more than any token"
    with pytest.raises(FieldError, match=rule), attach(model, DARE(most, W)) as run:
        run(IDS)
