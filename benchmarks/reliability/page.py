"""docs/reliability.md: what was done, and what came of it, from the committed records."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.reliability.merges import simulated
from benchmarks.reliability.numbers import QUANTILES
from benchmarks.speed.timing import RECORDS

RECORD = RECORDS / "reliability.json"


def load() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def _where(name: str) -> str:
    found = load()[name]["machine"]
    return (
        f"{found['cpu']}, {found['threads']} thread, load {found['load']}; Python {found['python']}, torch "
        f"{found['torch']}, transformers {found['transformers']}."
    )


def merge_table() -> str:
    """What merges cost."""
    rows = [
        "| model | window | profiles | bytes of one | all | each | bar for 10,000: 10 s |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in load()["merges"]["rows"]:
        each = row["seconds"] / row["profiles"]
        told = f"{row['profiles']:,} | {row['bytes']:,} | {row['seconds']:.1f} s | {1000 * each:.2f} ms"
        rows.append(f"| {row['model']} | {row['window']:,} | {told} | {_kept(10_000 * each <= 10)} |")
    return "\n".join([*rows, "", _where("merges")])


def simulation() -> str:
    """What a thousand workers would do, by what a merge costs."""
    found = simulated(10_000, load()["merges"]["rows"][-1])
    rows = [
        f"{found['shards']:,} shards, {1000 * found['seconds of a merge']:.2f} ms for a merge, "
        f"{found['bytes of a profile']:,} bytes for a profile over a link of {found['link'] / 1e9:.0f} GB/s, workers "
        "of unlike speed and shards of unlike length (each by up to half), added up in the order of the corpus:\n",
        "| workers | a shard takes | hours | of the ideal speed | leader or link busy | most profiles that wait |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        wait = row["most profiles that wait"]
        cells = [f"{row['workers']:,}", f"{row['seconds of a shard']:.0f} s", f"{row['hours']:.2f}"]
        cells += [f"{row['of the ideal']:.0%}", f"{row['busy']:.1%}"]
        cells += [f"{wait:,} ({wait * found['bytes of a profile'] / 1e6:,.0f} MB)"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def number_table() -> str:
    """How far the kernel and torch's lie from float64."""
    found = load()["numbers"]
    words = list(QUANTILES)
    rows = [
        f"| inputs | type | numbers | {' | '.join(f'native, {x}' for x in words)} | torch | {' | '.join(words)} |",
        f"|---|---|---:|{'---:|' * len(words)}---|{'---:|' * len(words)}",
    ]
    for row in found["rows"]:
        ours, theirs = ([f"{row[who][word]:.1e}" for word in words] for who in ("native", "torch"))
        cells = [row["case"], row["dtype"], f"{row['numbers']:,}", *ours, row["beside"], *theirs]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", _where("numbers")])


def _kept(holds: bool) -> str:
    return "kept" if holds else "**missed**"


TOLD: dict[str, tuple[str, str]] = {
    "kills": (
        "A job over a corpus killed at random moments",
        "One process, `kill -9`, started again until it is done; each finished profile beside that of a job that "
        "nobody killed, bit for bit: statistics, parts, counts and what could not be read. Every shard is saved.",
    ),
    "ray_kills": (
        "Two workers of Ray, their driver or all of them killed at random moments",
        "`kill -9` of the process that leads, of a worker, or of both and all that they started; where the driver was "
        "killed the same command is started again. Compared as above. Every shard is saved. Two of Ray's own helpers "
        "look for a driver that is gone for 60 s and end then; what lies among temporary files goes at the next start. "
        "The first 30 kills were counted in six runs whose figures a script put together; each later run was recorded "
        "by itself, job by job, and all of them stand in the record one by one.",
    ),
    "damaged": (
        "Damaged files",
        "Bits flipped, ends cut off, stretches taken out or put in, values of other kinds, in profiles, statistics and "
        "records: each is read or refused by one of heedful's own errors within 20 s.",
    ),
    "sanitized": (
        "Random problems for the native kernel, under the sanitizers",
        "Shapes, masks, block tables, keys picked one by one, soft caps, biases, sinks, padding, heads of unlike "
        "length in one piece, types and instruction sets by chance, for a kernel built with the address and "
        "undefined-behaviour sanitizers. Each problem is computed with one thread and with two to four, whose answers "
        "and sums must be the same bits, and beside the reference in float64, from which it may lie twice as far "
        "as the reference in its own type, and a rounding of the largest score or, in bfloat16, of the largest number.",
    ),
    "soak": ("A reader put on a model and taken off, over and over", "One forward and its answers each time."),
    "mixed": (
        "Everything by chance, for long",
        "Four tiny models and now and then the default one, in one process: methods of the whole catalogue, one to "
        "three at a time. After each thing that is done every tiny model is compared with what it was: weights, "
        "hooks, config. Some are interrupted (KeyboardInterrupt) at a random line of heedful's. Memory is looked at "
        "every half a minute; slopes are those of a straight line from a quarter of the time on. What is refused is a"
        " method that a model cannot have, by one of heedful's own errors.",
    ),
    "two_workers": (
        "Two workers beside one",
        "Documents a second of the default model, one thread each, in turns; the bar is 1.6 times on two cores that do "
        "nothing else. Where others compute too, as the load tells, two workers get twice the share of one, and the "
        "ratio flatters.",
    ),
    "checkpoints": (
        "What saves cost",
        "Of what the default model has found so far with windows of 2,048 tokens, five parts in double precision; the"
        " bar is 2 % of the time.",
    ),
}


NUMBERS = (
    "The native kernel's numbers beside torch's",
    "Distances from attention in float64 of the same inputs, in units of the root mean square of what float64 gives: "
    "the median, what 99.9 % stay below, and the worst of all. Scores have a spread of 2, where they are peaked of 16. "
    "SDPA is torch's own kernel for the CPU (its flash attention), handed the mask as a table; it has no soft cap, so "
    "beside one stands what models do where they look at the map: torch's operations one by one, softmax in float32.",
)


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    if isinstance(value, dict):
        return "; ".join(f"{name} {_told(x)}" for name, x in value.items()) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def page() -> str:
    """docs/reliability.md: what was done to it, and what it did."""
    found = load()
    rows = [
        "# Kills, damage, cycles\n",
        "Each was run as often as stands here, by `python -m benchmarks.reliability`, and no oftener.\n",
    ]
    for name, (title, about) in TOLD.items():
        if name in found:
            told = [f"- {key}: {_told(x)}" for key, x in found[name].items() if key not in ("machine", "each")]
            rows += [f"## {title}\n", f"{about}\n", *told, f"\n{_where(name)}\n"]
    if "numbers" in found:
        rows += [f"## {NUMBERS[0]}\n", f"{NUMBERS[1]}\n", number_table(), ""]
    end = "How corpora are read by many: [scale.md](scale.md)."
    return "\n".join([*rows, "## Merges\n", merge_table(), "", end, ""])
