"""In which of four patterns each mechanism attends: to itself or across, with or without an order of tokens.

python -m benchmarks.patterns      asks every mechanism and writes benchmarks/records/patterns.json

The four patterns and the length from which a mechanism pays are those of CAB (Zhang, Jiang, Feng, Zheng and Kong 2023,
arXiv 2210.07661); its seven tasks are not here, the lab trains on others.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import heedful
from benchmarks.speed.timing import RECORDS, label, load
from heedful import models
from heedful.catalogue import entries, room
from heedful.conformance.subjects import CROSS, IMAGE, LENGTH, TEXT, Subject, text, tiny_model
from heedful.conformance.tolerances import close_model
from heedful.core.errors import HeedfulError, InactiveWarning
from heedful.core.method import Method

RECORD = RECORDS / "patterns.json"
PATTERNS = ("self, causal", "self", "cross, causal", "cross")
YES, REFUSED, IDLE, LEAKS = "yes", "refused", "no effect", "leaks"
SINCE = 12  # tokens from here on are exchanged, and those before must not notice
FREE = replace(  # the same across, by a decoder that sees to both sides
    CROSS, name="free", inputs=lambda: {**CROSS.inputs(), "decoder_attention_mask": torch.ones(2, 1, *[LENGTH] * 2) > 0}
)
READS = Subject("reads", ("bert",), lambda: {"input_ids": text()})  # an encoder of text: it sees to both sides


@dataclass(frozen=True)
class Asked:
    """A model on which a pattern is tried, and its input with other late tokens; None where it has no order."""

    pattern: str
    subject: Subject
    later: Callable[[], dict[str, Tensor]] | None = None


def _exchanged(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :SINCE], text(7)[:, SINCE:]], 1)


TRIED = (
    Asked("self, causal", TEXT, lambda: {"input_ids": _exchanged(text())}),
    Asked("self", READS),
    Asked("self", IMAGE),
    Asked("cross, causal", CROSS, lambda: {**CROSS.inputs(), "decoder_input_ids": _exchanged(text(1))}),
    Asked("cross", FREE),
)


def _model(subject: Subject) -> nn.Module:
    kind = subject.kinds[0]
    return models.tiny(kind, attn_implementation="eager", num_hidden_layers=3) if kind == "bert" else tiny_model(kind)


@cache
def _plain(name: str) -> Tensor:
    subject = next(asked.subject for asked in TRIED if asked.subject.name == name)
    return subject.logits(_model(subject))


def answer(method: Method, asked: Asked) -> str:
    """Whether the method acts there, and keeps the order of tokens where there is one."""
    subject, model = asked.subject, _model(asked.subject)
    given = [subject] if asked.later is None else [subject, replace(subject, inputs=asked.later)]
    found = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveWarning)
        try:
            for one in given:
                with one.attach(model, method) as run:
                    _moved(run)
                    found.append(run(**one.inputs()).logits)
                if close_model(found[0], _plain(subject.name)):
                    return IDLE
        except HeedfulError:
            return REFUSED
    return LEAKS if len(found) > 1 and not close_model(found[0][:, :SINCE], found[1][:, :SINCE]) else YES


def _moved(run: Any) -> None:
    """Parameters away from where they begin, since some mechanisms begin as softmax itself."""
    draw = torch.Generator().manual_seed(0)
    for x in run.parameters():
        x.add_(0.1 * torch.randn(x.shape, generator=draw).to(x))


def patterns(method: Method) -> dict[str, str]:
    """The answer in each pattern; of several models the best."""
    found = dict.fromkeys(PATTERNS, REFUSED)
    for asked in TRIED:
        if found[asked.pattern] in (REFUSED, IDLE):
            found[asked.pattern] = answer(method, asked)
    return found


def mechanisms() -> dict[str, Method]:
    """An example of every method that stands in attention's place or changes it for good."""
    return {
        name: kind.example()
        for name, kind in entries().items()
        if issubclass(kind, Method) and room(kind).startswith("mechanisms/")
    }


def page() -> str:
    """The table."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    faster = {label(told): told["faster_from"] for told in load("linear") or []}
    timed = sorted({name for row in faster.values() for name in row})
    head = [
        "# Patterns of attention\n",
        "Which mechanisms attend in which pattern: within one text or picture, or from one text to another; causally, "
        "where no token may know of later ones, or to both sides. Each was tried with its example's settings, and with "
        "parameters moved away from their beginning, on tiny models: a Llama, a BERT or a ViT, and the cross-attention "
        f"of a BART, whose decoder is causal, and then is not. *{REFUSED}* is said with a reason; *{IDLE}* means that "
        f"no answer changed; *{LEAKS}*, that an early token's answer changed with a later one, so that it can train no "
        "model that writes. "
        "(The four patterns are those of [CAB](https://arxiv.org/abs/2210.07661).)\n",
        f"| mechanism | room | {' | '.join(PATTERNS)} |",
        "|---|---|" + ":---:|" * len(PATTERNS),
    ]
    nowhere = [name for name, row in found["rows"].items() if set(row["found"].values()) <= {REFUSED, IDLE}]
    rows = [
        f"| {name} | {row['room'].partition('/')[2]} | {' | '.join(row['found'][each] for each in PATTERNS)} |"
        for name, row in found["rows"].items()
        if name not in nowhere
    ]
    counts = ", ".join(f"{pattern}: {_count(found, pattern)}" for pattern in PATTERNS)
    every = sum(all(row["found"][p] == YES for p in PATTERNS) for row in found["rows"].values())
    out = [*head, *rows, f"\nOf {len(rows)}, {counts}; all four: {every}.\n"]
    if nowhere:
        out.append(
            f"Left out, since they changed no answer here (models were asked, not trained): {', '.join(nowhere)}.\n"
        )
    if timed:
        out += [
            "## From which length one pays\n",
            "The fewest tokens from which on a mechanism whose cost grows with the length is faster than torch's own "
            "attention, at every length tried ([speed](speed.md) has the times); none: not at any.\n",
            f"| machine | {' | '.join(timed)} |",
            "|---|" + "---:|" * len(timed),
        ]
        for machine, row in faster.items():
            out.append(f"| {machine} | {' | '.join(_length(row.get(name)) for name in timed)} |")
        out.append("")
    return "\n".join(out)


def _count(found: dict[str, Any], pattern: str) -> int:
    return sum(row["found"][pattern] == YES for row in found["rows"].values())


def _length(tokens: int | None) -> str:
    return "none" if tokens is None else f"{tokens:,}"


def main() -> None:
    rows = {}
    for name, method in mechanisms().items():
        rows[name] = {"room": room(type(method)), "found": patterns(method)}
        print(name, rows[name]["found"], flush=True)
    versions = {"heedful": heedful.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    told = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "rows": rows}
    RECORD.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
