"""The section of docs/coverage.md on models of other libraries."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from typing import Any

from .libraries_record import Group, Record
from .rows import FOUND, LIBRARIES

WORDS = {
    "served": "served whole", "served in part": "in part", "refused": "refused by name, with the reason",
    "wrong": "wrong", "looked at": "only looked at, without weights", "no attention": "without attention",
    "cannot build": "not built", "unseen": "not looked at yet",
}  # fmt: skip
GROUP = ("library", "class", "attention modules", "status", "measured", "layers", "names")
HOW = """By `python -m benchmarks.coverage.libraries`, of every name of timm and open_clip and every class of
diffusers. What modules compute attention, and how, decides what becomes of a model, not its name. So each name is
built at its own size on torch's meta device, where weights have no memory, and its forward is looked at as `attach`
looks at one: which modules are layers, which are out of reach, and why. Names of one class, whose attention modules
are of the same classes, switches and ways of calling, and of which the same is refused, are a group, and the smallest
of a group is measured with random weights: checks 1 to 5 above, 1 and 3 within the budget, since torch's kernels round
in their ways, or no further than torch's formula is from its kernel, and 4 by zeros alone, in all heads. timm's have
two blocks then and no large pictures, diffusers' few layers and heads, and what is large all the same is made narrower,
where the model takes that and is found to be of the same kinds so. Text towers that open_clip takes from the hub are
built small, of the same classes."""

REASONS = """`attach` names each module that it refuses, the reason, and what is left to serve (`only=`). What is no
product of queries and keys alone was made by a linear map or a convolution (outlook attention, pooling to a global
context, state spaces), of keys without queries (factorised attention, lambda layers), or by mixing heads (talking
heads). Over channels: rows and columns of the map are channels. Several calls: their difference is taken, or one goes
on from another. Changed after a softmax: a gate stands between two maps, say. Heads and texts in one axis, beside
windows: which numbers are a head's nobody tells."""


def section(table: Any) -> str:
    """Counts by library and reason, the groups, and which names stand in each."""
    told, record = json.loads(LIBRARIES.read_text()), Record.read()
    with_attention = [g for g in record.groups if (g["kinds"] or g["own"]) and record.members(g)]
    parts = [
        "## Other libraries",
        f"{' '.join(HOW.split())} Torch is {told['versions']['torch']}; the last of it was done on {told['date']}.",
        table(("library", "names", "with attention", *WORDS.values()), _totals(record, told["versions"])),
        "### By reason",
        f"{' '.join(REASONS.split())}",
        table(("library", "status", "reason", "names"), _reasons(record)),
        "### Groups",
        table(GROUP, map(_row(record), with_attention)),
        "### Names of each group",
        "\n".join(f"- {_title(record, g)}: {', '.join(record.members(g))}" for g in with_attention),
        "### Without attention",
        "\n".join(_without(record)),
    ]  # fmt: skip
    return "\n\n".join(parts)


def status(group: Group) -> str:
    if "failed" in group:
        return "cannot build"
    return str(group.get("status", "looked at")) if group["kinds"] or group["own"] else "no attention"


def sentence() -> str:
    """What became of all names that have attention."""
    record = Record.read()
    count = _count(record, *record.known)
    whole, part, refused, wrong, alone = (f"{count[s]:,}" for s in (*FOUND, "looked at"))
    return (
        f"Of {_attending(count):,} names of timm, diffusers and open_clip whose models have attention, {whole} are "
        f"served whole and {part} in part, {refused} are refused with the reason and {wrong} are wrong; {alone} were "
        f"only looked at, without weights. {count['cannot build']:,} more could not be built."
    )


def _count(record: Record, *sources: str) -> collections.Counter[str]:
    """Names of these libraries by what became of them."""
    count: collections.Counter[str] = collections.Counter()
    for group in record.groups:
        if group["library"] in sources:
            count[status(group)] += len(record.members(group))
    count["unseen"] = sum(record.known[source] for source in sources) - count.total()
    return count


def _attending(count: collections.Counter[str]) -> int:
    return sum(count[s] for s in (*FOUND, "looked at"))


def _totals(record: Record, versions: dict[str, str]) -> Iterator[list[object]]:
    for name, sources in (*((f"{x} {versions[x]}", [x]) for x in record.known), ("all", [*record.known])):
        count = _count(record, *sources)
        yield [name, *(f"{n:,}" for n in (count.total(), _attending(count), *(count[s] for s in WORDS)))]


def _reasons(record: Record) -> Iterator[list[object]]:
    found: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for group in record.groups:
        how = status(group)
        if how not in ("served", "no attention"):
            found[group["library"], how, _why(group)] += len(record.members(group))
    for (source, how, why), count in sorted(found.items(), key=lambda x: (x[0][0], x[0][1], -x[1])):
        if count:
            yield [source, how, why, f"{count:,}"]


def _why(group: Group) -> str:
    """Why it is not served whole: what is refused of it, each kind once."""
    own = dict.fromkeys(re.sub(r"\d+ calls", "several calls", why) for why in group.get("own", ()))
    told = "" if group.get("status") in ("wrong", "looked at") else "; ".join(own)
    return str(group.get("failed") or told or group.get("reason", "not measured yet"))


def _row(record: Record) -> Any:
    def row(group: Group) -> list[object]:
        layers = f"{group['entered']}/{group['layers']}" if "layers" in group else ""
        kinds = ", ".join(dict.fromkeys(group["kinds"] + [why.partition(":")[0] for why in group["own"]]))
        count = len(record.members(group))
        return [group["library"], group["class"], kinds, status(group), group.get("by", ""), layers, count]

    return row


def _title(record: Record, group: Group) -> str:
    return f"{group['library']}, {group['class']}, as {record.smallest(group)} ({status(group)})"


def _without(record: Record) -> Iterator[str]:
    for source in dict.fromkeys(source for source, _ in record.names):
        found: collections.Counter[str] = collections.Counter()
        maps: set[str] = set()
        for group in record.groups:
            if group["library"] == source and status(group) == "no attention":
                found[group["class"]] += len(record.members(group))
                maps |= set(group.get("softmax", ()))
        if found:
            said = f"; softmaxes that make no map, in {', '.join(sorted(maps))}" if maps else ""
            yield f"- {source}: {', '.join(f'{kind} ({n})' for kind, n in sorted(found.items()) if n)}{said}"
