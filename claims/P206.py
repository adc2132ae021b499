"""The Sparse Frontier: does moderate sparsity lose much on some task where the mean of tasks tells little?"""

from __future__ import annotations

import statistics

from claims._loaded import default
from claims.ledger import Claim, run
from heedful.bench.answer import answer
from heedful.bench.compare import label
from heedful.bench.presets import PRESETS
from heedful.catalogue import stack_from
from heedful.tasks import find
from heedful.text_models import Contender, text_model

BUDGET, PROMPTS, SEEDS = 0.5, 6, 5
METHODS = (f"snapkv(budget={BUDGET})", f"leoam(budget={BUDGET})")
TASKS = ("needle(length=192)", "multi_query(pairs=8)", "documents(documents=4)")


def losses(what: Contender | None, seed: int) -> dict[str, list[float]]:
    """By task, the log-probability of what is right on each prompt, nats a token."""
    model, tokenizer, _ = default()
    found: dict[str, list[float]] = {}
    with text_model(model, what) as speaker:
        for task in map(find, TASKS):
            items = task.items(tokenizer, PROMPTS, 100 + seed)
            found[task.name] = [task.nats(item, answer(speaker, item)) for item in items]
    return found


def halves(plain: dict[str, list[float]], mine: dict[str, list[float]]) -> list[dict[str, float]]:
    """By task, what was lost, on prompts of even and of odd number."""
    return [
        {
            task: statistics.fmean(a - b for a, b in zip(plain[task][i::2], mine[task][i::2], strict=True))
            for task in plain
        }
        for i in (0, 1)
    ]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    plain, numbers, effects = losses(None, seed), {}, []
    for text in METHODS:
        what = stack_from(text)
        lost = halves(plain, losses(what, seed))
        name = label(what)
        for task in plain:
            numbers[f"nats lost, {name}, {task}"] = statistics.fmean(half[task] for half in lost)
        for choose, tell in ((lost[0], lost[1]), (lost[1], lost[0])):  # the worst is named by other prompts
            task = max(choose, key=choose.__getitem__)
            effects.append(tell[task] - statistics.fmean(tell.values()))
    return statistics.fmean(effects), numbers


CLAIM = Claim(
    key="P206",
    method="compare",
    says="Even at moderate sparsity some task is lost much more than the mean of tasks says.",
    paper_number="none given in the abstract: even moderate sparsity often degrades at least one task",
    setup=f"SmolLM2-135M, {' and '.join(METHODS)} of the preset {next(iter(PRESETS))}, on {PROMPTS} prompts a seed of "
    f"each of {len(TASKS)} tasks ({', '.join(TASKS)}): nats of the right answer that are lost. The worst task is named "
    "by half of the prompts and measured on the other half, so that chance names none. That large sparse models beat "
    "small dense ones, and that decoding bears more than prefill, is not measured.",
    effect="nats a token lost on the worst task above the mean of tasks",
    measure=measure,
    seeds=SEEDS,
    strong=0.05,
)

if __name__ == "__main__":
    run(CLAIM)
