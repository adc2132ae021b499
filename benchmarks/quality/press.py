"""kvpress on prepared prompts, in its own environment: python -P press.py FOLDER PROMPTS ANSWERS.

As in kvpress' own pipeline the context is read and compressed first, then the question is read, and nothing is dropped
later. A press cuts a layer after its attention and changes nothing of the reading, so each context is read once and
every press compresses what was read. This file imports nothing of heedful's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from heedful.adapters.cache_name import CACHE

Compress = Callable[[int, Any, Any], tuple[Any, Any]]  # a layer's number, keys and values


class Reading:
    """One context, read without a cut; with what each layer's press would have been given."""

    def __init__(self, model: Any, context: list[int]) -> None:
        self.model, self.length, self.calls = model, len(context), {}
        layers = [layer.self_attn for layer in model.model.layers]
        hooks = [layer.register_forward_hook(self.take, with_kwargs=True) for layer in layers]
        self.cache = DynamicCache()
        model.model(input_ids=torch.tensor([context]), **{CACHE: self.cache})
        for hook in hooks:
            hook.remove()

    def take(self, module: Any, _: Any, given: dict[str, Any], output: Any) -> None:
        rest = {name: x for name, x in given.items() if name != CACHE}
        self.calls[module.layer_idx] = (module, rest, output[1])

    def under(self, press: Any) -> Compress:
        def compress(number: int, keys: Any, values: Any) -> tuple[Any, Any]:
            module, given, attentions = self.calls[number]
            found = press.compress(module, given["hidden_states"], keys, values, attentions, given)
            return found[0], found[1]

        return compress

    def answer(self, item: dict[str, list[int]], compress: Compress | None) -> dict[str, Any]:
        """Whether each right token is the likeliest, their mean log-probability, and the entries kept a head."""
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            pair = layer.keys, layer.values
            cache.update(*(pair if compress is None else compress(number, *pair)), number)
        kept, right = cache.get_seq_length(), torch.tensor(item["answer"])
        rest = torch.tensor([item["question"] + item["answer"][:-1]])
        places = torch.arange(self.length, self.length + rest.shape[1])[None]
        logits = self.model(input_ids=rest, **{CACHE: cache}, position_ids=places).logits[0, -len(right) :]
        likely = logits.log_softmax(-1)[torch.arange(len(right)), right]
        return {"right": bool((logits.argmax(-1) == right).all()), "nats": float(likely.mean()), "kept": kept}


@torch.no_grad()
def main() -> None:
    folder, prompts, answers = sys.argv[1:4]
    asked = json.loads(Path(prompts).read_text(encoding="utf-8"))
    # one press reads the weights, which only eager attention gives
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found: dict[str, list[Any]] = {}
    for item in asked["items"]:
        reading = Reading(model, item["context"])
        found.setdefault("whole", []).append(reading.answer(item, None))
        for name in asked["presses"]:
            for share in asked["shares"]:
                press = getattr(kvpress, name)(compression_ratio=1 - share)
                found.setdefault(f"{name} {share}", []).append(reading.answer(item, reading.under(press)))
    versions = {package: version(package) for package in ("kvpress", "transformers", "torch")}
    Path(answers).write_text(json.dumps({"versions": versions, "found": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
