"""ReferenceFrames: is a decoder's frame centralised and an encoder's bidirectional, and neither before training?"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from claims._texts import apart
from claims.ledger import Claim, run
from heedful import attach, models
from heedful.methods.observe.reference_frames import FRAMES, Frames, ReferenceFrames

TEXTS, WORDS, TOKENS = 8, 60, 64  # a seed
EXPECTED = {"SmolLM2": "centralised", "MiniLM": "bidirectional"}


@cache
def _loaded() -> dict[str, tuple[Any, Any, Any]]:
    """Of each model itself, one of its shape with fresh weights, and its tokenizer."""
    torch.manual_seed(0)
    decoder, encoder = models.default(), models.encoder()
    return {
        "SmolLM2": (decoder.model, AutoModelForCausalLM.from_config(decoder.model.config), decoder.tokenizer),
        "MiniLM": (encoder.model, AutoModel.from_config(encoder.model.config), encoder.tokenizer),
    }


def _frames(model: Any, texts: list[dict[str, Any]]) -> Frames:
    with attach(model.eval(), ReferenceFrames()) as attached, torch.no_grad():
        for inputs in texts:
            attached(**inputs)
        found: Frames = attached[ReferenceFrames()]
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    texts = apart(seed, TEXTS, WORDS)
    numbers, margins = {}, []
    for name, (trained, fresh, tokenizer) in _loaded().items():
        inputs = [tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS) for text in texts]
        seen, before = _frames(trained, inputs), _frames(fresh, inputs)
        margins.append(seen.mean(EXPECTED[name]) - before.mean(EXPECTED[name]))
        numbers |= {f"{kind}, {name}": seen.mean(kind) for kind in FRAMES}
        numbers[f"{EXPECTED[name]}, {name} before training"] = before.mean(EXPECTED[name])
        numbers |= {f"{end} token's share, {name}": seen.mean(end) for end in ("first", "last")}
        numbers[f"bidirectional over its layers, {name}"] = float(seen.kind == "bidirectional")
    return min(margins), numbers


CLAIM = Claim(
    key="P225",
    method="ReferenceFrames",
    says="Attention sinks are a frame of reference that training builds: one token in decoders with rotary positions, "
    "the two ends in encoders with absolute ones.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct and MiniLM, {TEXTS} pieces of Python's help texts a seed, cut to {TOKENS} tokens; "
    "the share of texts and layers with the frame that the paper expects of such a model, above that of the same "
    "shape with fresh weights, and of the two models the lower. Two models differ in more than their positions. One "
    "text had been looked at when this was written: MiniLM's layers came out centralised there. So they did in all "
    "draws: no text has both ends as its frame in any layer, trained or not, which makes the effect zero and its "
    "interval a point; the decoder alone would hold.",
    effect="share of texts and layers with the expected frame above an untrained model's, the lower of two models",
    measure=measure,
    seeds=8,
    strong=0.5,
)

if __name__ == "__main__":
    run(CLAIM)
