"""weight_gradients: do paragraphs that a model knows by heart pull at lower layers than paragraphs that it does not?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from claims._tiny_lm import BATCH, LENGTH, RATE, batch, fresh, text
from claims.ledger import Claim, run
from heedful.explaining import WeightGradients, weight_gradients

STEPS, LAYERS, PARAGRAPHS, REPEATED = 600, 4, 8, 4  # of the last, so many among the sequences of a step
PREFIX = LENGTH // 2  # bytes that are shown; the gradient is of what follows


def _paragraphs(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of the topics that training leaves out: those that are repeated all the same, and as many that are not.

    No two of them overlap.
    """
    data = text(held_out=True)
    starts = torch.randperm(len(data) // LENGTH, generator=draw)[: 2 * PARAGRAPHS] * LENGTH
    rows = torch.stack([data[i : i + LENGTH] for i in starts.tolist()])
    return rows[:PARAGRAPHS], rows[PARAGRAPHS:]


def _trained(seed: int, repeated: Tensor, draw: torch.Generator) -> Any:
    model = fresh(seed, LAYERS).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(STEPS):
        rate = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimiser.param_groups:
            group["lr"] = rate
        again = repeated[torch.randint(len(repeated), (REPEATED,), generator=draw)]
        ids = torch.cat([batch(draw, rows=BATCH - REPEATED), again])
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


def _pull(model: Any, rows: Tensor) -> WeightGradients:
    labels = rows.clone()
    labels[:, :PREFIX] = -100
    return weight_gradients(
        model, [{"input_ids": x[None], "labels": y[None]} for x, y in zip(rows, labels, strict=True)]
    )


@torch.no_grad()
def _recited(model: Any, rows: Tensor) -> float:
    """Which share of the bytes behind the prefix comes back, the likeliest byte at each, on the true text so far."""
    said = model(input_ids=rows, use_cache=False).logits[:, PREFIX - 1 : -1].argmax(-1)
    return float((said == rows[:, PREFIX:]).float().mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = torch.Generator().manual_seed(seed)
    known, unknown = _paragraphs(draw)
    model = _trained(seed, known, draw)
    found = {"by heart": _pull(model, known), "unseen": _pull(model, unknown)}
    numbers: dict[str, float] = {}
    for (name, gradients), rows in zip(found.items(), (known, unknown), strict=True):
        numbers |= {f"loss, {name}": gradients.loss, f"share recited, {name}": _recited(model, rows)}
        numbers[f"sum of gradients, {name}"] = float(gradients.by_layer.sum())
        numbers[f"depth of gradients, {name}"] = gradients.depth
        numbers |= {f"share of layer {n}, {name}": share for n, share in enumerate(gradients.share.tolist())}
    return found["unseen"].depth - found["by heart"].depth, numbers


CLAIM = Claim(
    key="P116",
    method="weight_gradients",
    says="Gradients of paragraphs that a model knows by heart are larger in lower layers than those of others.",
    paper_number="none in the abstract; GPT-Neo 125M, 50 tokens after a prefix of 50",
    setup=f"{LAYERS}-layer byte models trained {STEPS} steps on Python's documentation, half of each batch from "
    f"{PARAGRAPHS} paragraphs, drawn for each seed, that come again and again; as many of the same topics that never "
    f"come. Gradients of the attention's weights for the {LENGTH - PREFIX} bytes after a prefix of {PREFIX}, paragraph "
    "by paragraph. Not SmolLM2 and a licence: which paragraphs a released model has seen, and has not, is not known. "
    "(Begun with 16 paragraphs and 300 steps, after which two thirds to four fifths of their bytes were recited: four "
    "seeds pointed the other way, by 0.006 to 0.030. With all recited, after 1200 steps, a seed that is not among "
    "these had +0.054; that settled that paragraphs must be known by heart, and fewer steps are for time.)",
    effect="depth of the middle of the gradients (0 first layer, 1 last), unseen less by heart",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
