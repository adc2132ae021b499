"""FlexAttention: who sees which fine token, layer by layer, in loops over a llama's own attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.core.regions import Region
from heedful.methods import FlexAttention
from tests.by_hand import heads_of, in_pieces, llama_states

N = 24
LOW, HIGH = Region(((1, 3), (4, 8)), (2, 3)), Region(((8, 20),), (4, 3))
ROW = Region(((1, 4),)), Region(((4, 10),))
UNEVEN = LOW, Region(((8, 20),), (3, 4))
FINE_FIRST = Region(((14, 20),), (2, 3)), Region(((1, 3), (4, 14)), (4, 3))


def places(region: Region) -> list[int]:
    return [p for start, stop in region for p in range(start, stop)]


def parent(j: int, low: Region, high: Region) -> int:
    """Which coarse place holds the fine place j."""
    (rows, cols), (many_rows, many_cols) = ((r.grid or (1, len(places(r)))) for r in (low, high))
    y, x = divmod(j, many_cols)
    return (y * rows // many_rows) * cols + x * cols // many_cols


def states(
    model: Any, ids: Tensor, first: int, threshold: float, low: Region, high: Region
) -> tuple[Tensor, list[int]]:
    """Of one text; and how many fine tokens the words saw in each layer."""
    chosen: dict[int, set[int]] = {}
    counts = []
    end = max(*places(low), *places(high)) + 1

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Any) -> Tensor:
        n = q.shape[2]
        q, k = turn(q), turn(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        seen = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for j in range(i + 1):
                fine = j in places(high)
                seen[i, j] = not fine or i == j or (i >= end and j in chosen.get(i, set()))
        counts.append(sum(len(x) for x in chosen.values()))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        chosen.clear()
        for i in range(end, n):
            looks = [float(weights[0, :, i, j].mean()) for j in places(low)]
            hot = {c for c, x in enumerate(looks) if x - min(looks) > threshold * (max(looks) - min(looks))}
            if layer >= first:
                chosen[i] = {p for j, p in enumerate(places(high)) if parent(j, low, high) in hot}
        return heads_of(weights, v)

    return llama_states(model, ids, attend), counts


@pytest.mark.parametrize(
    ("low", "high"), [(LOW, HIGH), ROW, FINE_FIRST, UNEVEN], ids=["grids", "rows", "fine first", "uneven"]
)
@pytest.mark.parametrize(("first", "threshold"), [(0, 0.25), (1, 0.6), (0, 0.0), (9, 0.25)])
def test_words_see_the_fine_tokens_where_they_looked(low: Region, high: Region, first: int, threshold: float) -> None:
    model = models.tiny("llama", num_hidden_layers=3, dtype=torch.float64)
    ids = torch.randint(3, 100, (2, N), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(N) >= torch.tensor([[0], [2]])).long()
    at = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    method = FlexAttention(first, threshold)
    with torch.no_grad(), attach(model, method, roles={"low": low, "high": high}) as run:
        found = run(input_ids=ids, **at).logits
        for b, pad in enumerate((0, 2)):
            wanted, counts = states(model, ids[b : b + 1, pad:], first, threshold, low, high)
            assert close_model(found[b, pad:].float(), model.lm_head(wanted)[0].float())
            assert [x > 0 for x in counts] == [layer > first for layer in range(3)]


def test_a_text_in_pieces_is_the_text() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    ids = torch.randint(3, 100, (2, N), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, FlexAttention(0), roles={"low": LOW, "high": HIGH}) as run:
        assert close_model(in_pieces(run, ids, (20, 1, 2, 1))[0], run(input_ids=ids).logits)


def test_what_is_picked() -> None:
    looks = torch.tensor([[[0.1, 0.3, 0.2, 0.5], [0.2, 0.2, 0.2, 0.2]]])
    assert FlexAttention().picked(looks).int().tolist() == [[[0, 1, 0, 1], [0, 0, 0, 0]]]  # above 0.1 + 0.1004
    assert FlexAttention(threshold=0.6).picked(looks).int().tolist() == [[[0, 0, 0, 1], [0, 0, 0, 0]]]
    assert FlexAttention(threshold=0.0).picked(looks).int().tolist() == [[[0, 1, 1, 1], [0, 0, 0, 0]]]


def test_what_cannot_be() -> None:
    assert FlexAttention() == FlexAttention(8, 64 / 255, "low", "high")
    assert FlexAttention.example() == FlexAttention(0, 0.4, "marked", "answer")
    for wrong in ({"first": -1}, {"threshold": -0.1}, {"threshold": 1.0}, {"low": ""}, {"high": ""}):
        with pytest.raises(FieldError, match=rf"FlexAttention\.{next(iter(wrong))} = "):
            FlexAttention(**wrong)  # type: ignore[arg-type]
    model = models.tiny("llama")
    with (
        attach(model, FlexAttention(0), roles={"low": LOW, "high": ROW[1]}) as run,
        pytest.raises(FieldError, match="both images must have grids alike"),
    ):
        run(**models.tiny_inputs(model, length=N))


@pytest.mark.parametrize("written", [24, 30])
def test_an_encoders_choice_is_its_own(written: int) -> None:
    model, draw = models.tiny("bart"), torch.Generator().manual_seed(0)
    ids, answer = (torch.randint(3, 60, (1, n), generator=draw) for n in (26, written))
    roles = {"low": Region(((0, 4),), (2, 2)), "high": Region(((4, 20),), (4, 4))}
    with torch.no_grad(), attach(model, FlexAttention(0), roles=roles) as run:
        whole = run(input_ids=ids, decoder_input_ids=answer)
    told = (whole.encoder_last_hidden_state,)
    with torch.no_grad(), attach(model, FlexAttention(0), roles=roles, only="model.decoder") as run:
        assert close_model(run(encoder_outputs=told, decoder_input_ids=answer).logits, whole.logits)


@torch.no_grad()
def test_layers_are_counted_from_the_language_models_first() -> None:
    model = models.tiny("llava", text_config={"num_hidden_layers": 3})
    ids = torch.randint(3, 60, (2, N), generator=torch.Generator().manual_seed(0))
    kept = {"roles": {"low": LOW, "high": HIGH}}
    own = model.model.language_model
    with attach(own, FlexAttention(1, 0.0), **kept) as run:
        alone = run(input_ids=ids).last_hidden_state
    encoder = len(model.model.vision_tower.encoder.layers)
    with attach(model, FlexAttention(1, 0.0).on(layers=range(encoder, encoder + 3)), **kept) as run:
        assert close_model(run(input_ids=ids, output_hidden_states=True).hidden_states[-1], alone)
