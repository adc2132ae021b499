"""Whether explanations beat random order on deletion and insertion: rollout, flow and attribution on two models.

    python -m benchmarks.quality.faithfulness

Writes benchmarks/records/faithfulness.json: mean gains over texts and their bootstrap intervals.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.timing import record
from claims._texts import sentences
from heedful import models
from heedful.core.method import Method
from heedful.explaining.attribution import attribute
from heedful.explaining.faithful import faithfulness
from heedful.methods.explain.attention_flow import AttentionFlow
from heedful.methods.explain.rollout import AttentionRollout
from heedful.methods.explain.transformer_attribution import TransformerAttribution

TEXTS, STEPS, SEEDS, RESAMPLES = 32, 5, 4, 10_000


def interval(x: Tensor) -> list[float]:
    """The middle 95% of the means of resampled texts."""
    draw = torch.Generator().manual_seed(0)
    means = x[torch.randint(len(x), (RESAMPLES, len(x)), generator=draw)].mean(1)
    return [round(float(q), 4) for q in means.quantile(torch.tensor([0.025, 0.975], dtype=x.dtype))]


def measure(name: str, loaded: models.Loaded, flow: AttentionFlow) -> list[dict[str, Any]]:
    """One row an explanation."""
    model, tokenizer, _ = loaded
    methods: tuple[Method, ...] = (AttentionRollout(), flow, TransformerAttribution())
    gains: dict[str, list[tuple[float, float]]] = {type(m).__name__: [] for m in methods}
    lengths, unit = [], ""
    for i, text in enumerate(sentences(0, TEXTS, 8, 13)):
        began = time.perf_counter()
        ids = tokenizer(text, return_tensors="pt").input_ids
        scores = {type(m).__name__: attribute(model, ids, m) for m in methods}
        found = faithfulness(model, ids, scores, steps=STEPS, seeds=SEEDS)
        for explanation, pair in found.gains.items():
            gains[explanation].append(pair)
        lengths.append(ids.shape[1])
        unit = found.unit
        print(f"{name}, text {i + 1} of {TEXTS}: {time.perf_counter() - began:.1f} s", flush=True)
    rows = []
    for explanation, pairs in gains.items():
        both = torch.tensor(pairs, dtype=torch.float64)  # [texts 2]
        row: dict[str, Any] = {"model": name, "explanation": explanation, "unit": unit, "texts": TEXTS}
        row["tokens"] = [min(lengths), max(lengths)]
        for side, x in (("deletion", both[:, 0]), ("insertion", both[:, 1])):
            row[side] = {"gain": round(float(x.mean()), 4), "interval": interval(x), "better": int((x > 0).sum())}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    rows = measure("MiniLM-L6", models.encoder(), AttentionFlow())
    rows += measure("SmolLM2-135M", models.default(), AttentionFlow(rows=(-1,)))
    record(
        "faithfulness", rows, steps=STEPS, random_orders=SEEDS, resamples=RESAMPLES,
        removal="hidden from all others; the first and the last token stay",
    )  # fmt: skip


if __name__ == "__main__":
    main()
