"""SecondarySinks: do tokens beside the first become sinks in the middle of the model, and draw less than it does?"""

from __future__ import annotations

import torch

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.observe.secondary_sinks import SecondarySinks

TEXTS, TOKENS = 4, 384  # a seed


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    depth = model.config.num_hidden_layers
    with attach(model, SecondarySinks()) as attached, torch.no_grad():
        for text in passages(seed, TEXTS, TOKENS):
            attached(input_ids=torch.tensor([tokenizer(text).input_ids[:TOKENS]]))
        found = attached[SecondarySinks()]
    levels = found.levels
    total = sum(level.number for level in levels)
    if not total:
        return 0.0, {"secondary sinks a text": 0.0}
    third = depth / 3
    middle = sum(level.number for level in levels if third <= level.born < 2 * third)
    where = [n for n, number in found.by_layer.items() if number > 0]
    numbers = {
        "secondary sinks a text": total,
        "layer after which most arise": float(levels[0].born),
        "layers that these last": float(levels[0].lasts),
        "levels": float(len(levels)),
        "weight on each, where there are some": sum(found.weight[n] for n in where) / len(where),
        "weight on the first token there": sum(found.first_weight[n] for n in where) / len(where),
    }
    # the paper's 'primarily in the middle layers', against what an even spread over the depth would give
    return middle / total - 1 / 3, numbers


CLAIM = Claim(
    key="P032",
    method="SecondarySinks",
    says="Beside the first token, secondary sinks arise primarily in the middle layers, last for a varying number of "
    "layers and draw less attention, but still much.",
    paper_number="three levels of sinks in QwQ-32B, six in Qwen3-14B",
    setup="SmolLM2-135M-Instruct, 4 of Python's help texts a seed cut to 384 tokens. Middle means the middle third of "
    "the 30 layers; what they draw is among the details.",
    effect="share of secondary sinks that arise in the middle third, minus one third",
    measure=measure,
)


if __name__ == "__main__":
    run(CLAIM)
