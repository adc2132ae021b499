"""Attention Editing: is a model best converted layer by layer first, then as a whole?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Generator

import heedful
from claims._lab import BYTES, LAB
from claims.ledger import Claim, run
from heedful.methods import AttentionEditing, GatedHeads, SinkWindow

STEPS = 60  # of each stage
TARGET = SinkWindow(1, 4) | GatedHeads(whole=True)  # gates begin at a half, as new ones do
WAYS = {  # passes over STEPS batches: in layers, and as a whole
    "swapped": (0, 0),
    "layers alone": (1, 0),
    "whole alone": (0, 2),
    "layers, then whole": (1, 1),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    with LAB.opened(BYTES, None, seed) as opened:
        found = {"teacher": BYTES.loss(opened, seed)}
        opened.pause()
        model: Any = copy.deepcopy(opened.model)
        opened.resume()
    random = Generator().manual_seed(seed)
    batches = [{"input_ids": BYTES.batch(seed, random)["input_ids"]} for _ in range(STEPS)]
    with torch.enable_grad():
        for name, (layers, whole) in WAYS.items():
            how = AttentionEditing(TARGET, layer_epochs=layers, epochs=whole)
            with heedful.fit(how, model, batches) as taught, torch.no_grad():
                found[name] = BYTES.loss(taught, seed)
    swapped, layers_alone, whole_alone, both = (found[name] for name in WAYS)
    return min(swapped - layers_alone, layers_alone - both, whole_alone - both), found


CLAIM = Claim(
    key="P298",
    method="AttentionEditing",
    says="Teaching layers on the teacher's inputs, then the whole by its logits, converts a model with competitive "
    "quality, and the first stage prevents that errors of a cold start add up.",
    paper_number="Qwen3-8B and Qwen3-30B-A3B as MLA and GateSWA with competitive performance; no such ablation at hand",
    setup=f"The lab's byte model, 200 steps, to one sink, windows of 4 bytes and new gates in both layers, on {STEPS} "
    f"batches of its training text: swapped untrained; {STEPS} steps in layers; {2 * STEPS} as a whole; {STEPS} in "
    f"layers, then {STEPS} as a whole. Loss on another held-out tenth a seed.",
    effect="nats a byte, the least of: swapped over layers alone, layers alone over both, as many steps of the whole "
    "over both",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
