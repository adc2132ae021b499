"""Attention sinks side by side: how many there are, how far activations stand out, and the loss, under each method.

python -m benchmarks.sinks      measures every way on the default model and writes benchmarks/records/sinks.json

The three kinds, use, explanation and mitigation, are those of the survey Attention Sink in Transformers (P051).
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
import transformers

import heedful
from benchmarks.speed.timing import RECORDS
from claims._texts import apart
from claims.ledger import RESULTS, hardware
from heedful import attach, models
from heedful.core.method import Part, Stack
from heedful.laboratory.course import told
from heedful.laboratory.differences import Difference
from heedful.methods import (
    ACT,
    ClippedSoftmax,
    MaxActivations,
    SigmoidAttention,
    SinkRate,
    SinkWindow,
    TempScale,
)  # fmt: skip

RECORD = RECORDS / "sinks.json"
TEXTS, WORDS, LENGTH, WINDOW = 4, 150, 160, 32  # tokens are cut at LENGTH; the window of those that have one
WAYS: dict[str, tuple[str, Part | Stack]] = {
    "as it is": ("", Stack()),
    f"SinkWindow(4, {WINDOW - 4})": ("used as anchors", SinkWindow(4, WINDOW - 4)),
    f"SinkWindow(1, {WINDOW - 1})": ("used as anchors", SinkWindow(1, WINDOW - 1)),
    f"SinkWindow(0, {WINDOW})": ("taken away", SinkWindow(0, WINDOW)),
    "ACT()": ("turned down", ACT()),
    "TempScale(1.1)": ("turned down", TempScale(1.1)),
    "ClippedSoftmax()": ("another normaliser, untrained", ClippedSoftmax()),
    f"SigmoidAttention({LENGTH})": ("another normaliser, untrained", SigmoidAttention(LENGTH)),
}
CLAIMS = {  # of the ledger, by what they are about
    "explained": ("P025", "P032", "P004", "P309"),
    "mitigated by training": ("P025_sigmoid", "P304", "P304_gated", "P314_outliers", "P313"),
}
SINKS, MAXIMA = SinkRate(), MaxActivations()


def measure(way: Part | Stack, texts: list[torch.Tensor]) -> dict[str, float | None]:
    """The mean over texts of the loss, the share of heads with a sink, and the largest activation over the mean."""
    found: dict[str, list[float]] = {"loss": [], "sinks": [], "largest": []}
    for ids in texts:
        stack = way if isinstance(way, Stack) else Stack((way,))
        with torch.no_grad(), attach(models.default().model, stack | SINKS | MAXIMA) as run:
            logits = run(input_ids=ids, use_cache=False).logits[0, :-1].float()
            found["loss"].append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
            if (sinks := told(run, SINKS)) is not None:
                found["sinks"].append(sinks.first)
            if (maxima := told(run, MAXIMA)) is not None:
                found["largest"].append(max(peaks.ratio for peaks in maxima.layers.values()))
    return {name: statistics.fmean(row) if row else None for name, row in found.items()}


def page() -> str:
    """The two tables."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    plain = found["rows"]["as it is"]
    out = [
        "# Attention sinks\n",
        "Many heads give most of their weight to the first token, whatever it says. A survey "
        "([Attention Sink in Transformers](https://arxiv.org/abs/2604.10098)) parts what is written about them into "
        "use, explanation and mitigation; so does this page, with what the catalogue has.\n",
        "## Without training\n",
        f"{found['model']}, which was trained with sinks, on {found['texts']} pieces of {found['tokens']} tokens of "
        "Python's documentation. *Sinks* is the share of heads and texts in which the first token gets more than 30% "
        "of the weight of those that see it (`SinkRate`; under a window without sinks these are few), *largest* the "
        "largest activation over its layer's mean (`MaxActivations`).\n",
        "| method | the sink is | sinks | largest, × mean | loss, nats a token | above the model's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        cells = [
            "-" if row["sinks"] is None else f"{row['sinks']:.0%}",
            "-" if row["largest"] is None else f"{row['largest']:,.0f}",
            f"{row['loss']:.3f}",
            "" if row is plain else f"{row['loss'] - plain['loss']:+.3f}",
        ]
        out.append(f"| {name} | {row['kind']} | {' | '.join(cells)} |")
    out += [
        f"\n{found['hardware']}, {', '.join(f'{name} {v}' for name, v in found['versions'].items())}.\n",
        "## Explained, and mitigated by training\n",
        "What [the ledger](claims.md) has measured on small models. On text the lab's trainings are too short for "
        "softmax to show sinks of itself; on words that are copied from behind triggers (`heedful lab --kind sinks`) "
        "it shows them, and what removes them is measured there; what is removed at the price of the loss counts for "
        "nothing (the ledger says how much that is).\n",
        "| | method | the paper says | effect | mean, 95% interval | verdict |",
        "|---|---|---|---|---:|---|",
    ]
    for kind, keys in CLAIMS.items():
        for key in keys:
            claim = json.loads((RESULTS / f"{key}.json").read_text(encoding="utf-8"))
            gap = Difference.of(claim["effects"])
            out.append(
                f"| {kind} | {claim['method']} ({key}) | {claim['says']} | {claim['effect']} | "
                f"{gap.mean:+.3g} [{gap.low:+.3g}, {gap.high:+.3g}] | {claim['verdict']} |"
            )
    return "\n".join(out) + "\n"


def main() -> None:
    tokenizer = models.default().tokenizer
    pieces = (tokenizer(text, return_tensors="pt").input_ids for text in apart(0, TEXTS, WORDS))
    texts = [ids[:, :LENGTH] for ids in pieces]
    rows: dict[str, dict[str, Any]] = {}
    for name, (kind, way) in WAYS.items():
        rows[name] = {"kind": kind, **measure(way, texts)}
        print(name, rows[name], flush=True)
    versions = {"heedful": heedful.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found = {
        "model": models.default().name, "texts": len(texts), "tokens": LENGTH, "date": time.strftime("%Y-%m-%d"),
        "versions": versions, "hardware": hardware(), "rows": rows,
    }  # fmt: skip
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
