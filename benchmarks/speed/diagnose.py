"""The whole of `heedful.diagnose`, part by part, over plain forwards of the same windows with the last logits alone."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.speed.model import contenders, load, tokens
from benchmarks.speed.timing import record, told
from heedful import diagnose

PLAIN, WHOLE = "plain forward, last logits", "diagnose, the whole"
PARTS = {"text": "the text", "trials": "own prompts", "weights": "the weights", "view": "the token view"}
READERS = ("diagnose, native", "diagnose, tiled")  # the text's pass alone, by each backend
WORDS = "answers and words"


def timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def once(model: Any, tokenizer: Any, windows: torch.Tensor) -> dict[str, float]:
    """Seconds of one turn, by contender."""
    feeds = [{"input_ids": row[None], "use_cache": False, "logits_to_keep": 1} for row in windows]
    found = {PLAIN: timed(lambda: [model(**feed) for feed in feeds])}
    began = time.perf_counter()
    profile = diagnose(model, windows, tokenizer=tokenizer)
    str(profile)
    found[WHOLE] = time.perf_counter() - began
    found |= {name: profile.facts["seconds"][stage] for stage, name in PARTS.items()}
    return found | {WORDS: found[WHOLE] - sum(found[name] for name in PARTS.values())}


@torch.no_grad()
def measure(quick: bool = False, rounds: int = 7) -> None:
    """One window of 2k tokens, with the readers alone beside it, and ten of them."""
    model, tokenizer = load()
    length, rounds = (256, 1) if quick else (2048, rounds)
    rows: list[dict[str, Any]] = []
    for count in (1, 10):
        windows = tokens(tokenizer, count * length).view(count, length)
        alone = {name: contenders(model, tokenizer, length)[name] for name in READERS} if count == 1 else {}
        taken: dict[str, list[float]] = {}
        once(model, tokenizer, windows[:1])
        for run in alone.values():
            run()
        for _ in range(rounds if count == 1 else -(-rounds // 2)):
            turn = once(model, tokenizer, windows) | {name: timed(run) for name, run in alone.items()}
            for name, seconds in turn.items():
                taken.setdefault(name, []).append(seconds)
        rows.append({"tokens": length, "windows": count, "found": told(taken, PLAIN)})
        print(count, {name: (x["ratio"], *x["quartiles"]) for name, x in rows[-1]["found"].items()}, flush=True)
    record("diagnose", rows, baseline=PLAIN, model="SmolLM2-135M")
