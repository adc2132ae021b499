"""Three conversions of the default model: loss before, after and the teacher's, what its cache holds, and its speed.

python -m benchmarks.quality.converting            makes them all and writes benchmarks/records/converting.json
python -m benchmarks.quality.converting NAME ...   makes these and leaves the rest of the record as it is
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.speed.timing import label, load, machine, record
from claims._texts import apart
from heedful import attach, fit, models, operate
from heedful.bench.cost import cost
from heedful.bench.results import price
from heedful.core.kinds.tokens import Prompt
from heedful.core.kinds.weights import Surgery
from heedful.core.method import Part, Stack, as_stack
from heedful.methods import MALA, AttentionEditing, GatedHeads, MultiQueryAttention, SinkWindow
from heedful.models import smollm2

NAME = "converting"
TEXTS, HELD_OUT, WORDS, TOKENS = 16, 8, 220, 256
READ, TURNS = 1024, 5
EVERY_OTHER, FOUR = list(range(1, 30, 2)), [4, 11, 18, 25]  # of 30 layers
WAYS: dict[str, tuple[Part | Stack, Surgery | None, str]] = {
    "gated window": (
        SinkWindow(4, 64).on(layers=EVERY_OTHER) | GatedHeads(fine_tune=True, whole=True).on(layers=EVERY_OTHER),
        None,
        "4 sinks, 64 tokens back and gates in every other layer",
    ),
    "one key head": (Stack(()), MultiQueryAttention("mean"), "one key head in place of three in all layers"),
    "linear": (MALA().on(layers=FOUR), None, "MALA in four of thirty layers"),
}


def loss(run: Any, texts: list[dict[str, torch.Tensor]]) -> float:
    """Nats a token, the mean over texts."""
    with torch.no_grad():
        found = [cross_entropy(run(**t, use_cache=False).logits[0, :-1].float(), t["input_ids"][0, 1:]) for t in texts]
    return float(torch.stack(found).mean())


def convert(name: str, model: Any, texts: list[Any], held_out: list[Any], prompt: Prompt) -> dict[str, Any]:
    """One row. Time and memory do not hang on what weights were taught, and are those of the model as it is swapped."""
    what, surgery, about = WAYS[name]
    row: dict[str, Any] = {"name": name, "about": about, "texts": len(texts), "teacher": loss(model, held_out)}
    swapped = model if surgery is None else operate(model, surgery)
    with attach(swapped, what) as run:
        row["before"] = loss(run, held_out)
    pairs: list[dict[int, Any]] = [{}, {}]
    for turn in range(TURNS + 1):
        pairs[0][turn] = cost(model, None, "teacher", prompt, turn)
        pairs[1][turn] = cost(swapped, as_stack(what), name, prompt, turn)
    row["price"] = asdict(price(pairs[1], pairs[0]))
    began = time.perf_counter()
    with torch.enable_grad(), fit(AttentionEditing(what, surgery), model, texts) as taught:
        row["after"] = loss(taught, held_out)
    return row | {"seconds": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description="convert the default model in three ways")
    parser.add_argument("names", nargs="*", help="ways; all by default")
    asked = parser.parse_args().names or list(WAYS)
    model, tokenizer, _ = models.default()
    texts, held_out = (
        [{"input_ids": tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]} for text in drawn]
        for drawn in (apart(0, TEXTS, WORDS, fitting=True), apart(0, HELD_OUT, WORDS))
    )
    long = " ".join(apart(1, READ // WORDS + 1, WORDS))
    prompt = Prompt(tuple(tokenizer(long).input_ids[:READ]))
    own = label({"machine": machine()})
    rows = [row for told in load(NAME) if label(told) == own for row in told["rows"] if row["name"] not in asked]
    for name in asked:
        rows.append(convert(name, model, texts, held_out, prompt))
        print(rows[-1], flush=True)
        record(NAME, rows, model=smollm2.REPO, prompt=len(prompt), inputs=f"help texts of up to {TOKENS} tokens")


if __name__ == "__main__":
    main()
