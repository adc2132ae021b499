"""Models of other libraries under heedful: every name of timm and open_clip, and every class of diffusers.

    python -m benchmarks.coverage.libraries look [LIBRARY]      tells what each name's attention is, without its weights
    python -m benchmarks.coverage.libraries [PATTERN]           measures the smallest name of each kind

Both resume. What modules compute attention, and how, decides what becomes of a model, not its name: names of one class,
whose attention modules are of the same kinds and of which the same is refused, are alike, and the smallest of them is
measured with weights. Writes benchmarks/records/libraries.json, of which `make docs` makes its section of
docs/coverage.md.
"""

from __future__ import annotations

import re
import resource
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import heedful
from heedful.adapters.kvcache import tensors_in
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import DEPTH, ROUNDINGS, close, error
from heedful.core.errors import HeedfulError, InactiveWarning

from . import library_cases as cases
from .libraries_look import UNSEEN, look, unset
from .libraries_models import SOURCES, makers, smaller
from .libraries_record import Group, Record
from .probe import TILE_ROWS, DropHeads, DropPattern, Look, _suggestion

MEMORY = 6 << 30  # bytes that it may take; what wants more is told as one that failed
MOST = 250_000_000  # parameters of a model that is measured with weights
EVERY = 20  # names between two times that the record is written


def look_at_all(record: Record, only: str) -> None:
    """Sort each name that is new into the group of those that are alike."""
    for source in SOURCES:
        if only not in ("", source):
            continue
        names = makers(source)
        record.keep(source, names)
        for number, name in enumerate(n for n in names if (source, n) not in record.names):
            start = time.perf_counter()
            told = _seen(source, name)
            record.sort_in(source, name, told)
            print(source, name, told, round(time.perf_counter() - start, 1), flush=True)
            if number % EVERY == 0:
                record.write()
    record.write()


def _seen(source: str, name: str, **how: Any) -> dict[str, Any]:
    """What a look tells of a name; without memory, where its forward asks no tensor what is in it."""
    make, size = makers(source)[name], 0
    try:
        with torch.device("meta"):
            with unset():
                case = make(**how)
            size = sum(p.numel() for p in case.model.parameters())
            return look(case.model, case.call)
    except Exception as first:  # noqa: BLE001 - whatever ends it is its reason
        why = f"{type(first).__name__}: {str(first).splitlines()[0][:120] if str(first) else ''}"
    if 8 * size > MEMORY or not any(x in why.lower() for x in UNSEEN):
        return {"failed": why}
    try:
        case = make(**how)
        return look(case.model, case.call)
    except Exception as error:  # noqa: BLE001
        return {"failed": f"{type(error).__name__}: {str(error)[:120]}"}


def measure_all(record: Record, pattern: str) -> None:
    """Measure the smallest name of each group whose models compute attention, groups of many names first."""
    for group in sorted(record.groups, key=lambda g: -len(record.members(g))):
        name = record.smallest(group)
        done = group.get("status") not in (None, "looked at")  # what had no small form may have one now
        if done or not name or not re.search(pattern, name) or not (group["kinds"] or group["own"]):
            continue
        start = time.perf_counter()
        group.pop("reason", None)
        group |= {"by": name, **_measured(group, name)}
        group["seconds"] = round(time.perf_counter() - start, 1)
        print(group["library"], name, group["status"], group.get("reason", ""), group["seconds"], flush=True)
        record.write()


def _measured(group: Group, name: str) -> dict[str, Any]:
    source, why = group["library"], "not the same when looked at again"
    for how in smaller(source, name):
        told = _seen(source, name, **how)
        if {*told.get("kinds", ())} != {*group["kinds"]} or told.get("own", []) != group["own"]:
            continue
        if told["parameters"] > MOST:
            why = f"{told['parameters']:,} parameters"
            continue
        case = makers(source)[name](**how)
        case = case._replace(model=cases.drawn(case.model, 0.05 if source == "timm" else 0.1))
        try:
            return examine(case) | {"how": how}
        except Exception as error:  # noqa: BLE001 - it ran in the look, so that whatever ends it is a fault
            why = f"{type(error).__name__}: {str(error)[:160]}"
            if "allocate memory" not in why:
                return {"status": "wrong", "reason": why, "how": how}
    return {"status": "looked at", "reason": why}


def _tensors(answer: Any) -> list[Tensor]:
    found = [x for x in tensors_in(answer) if x.is_floating_point()]
    if not found:
        raise ValueError(f"no tensor in an answer of {type(answer).__name__}, so nothing can be compared")
    return found


@torch.no_grad()
def examine(case: cases.Case) -> dict[str, Any]:
    """The same questions as for transformers' classes."""
    model, only, call = case.model, None, case.call

    def seeded() -> Any:
        torch.manual_seed(0)  # some draw noise
        return call()

    case = case._replace(call=seeded)

    def under(what: Any, **how: Any) -> tuple[list[Tensor], Any]:
        with heedful.attach(model, what, only=only, inputs=case.call, **how) as run:
            return _tensors(case.call()), run

    native, slow = _tensors(case.call()), _slow(case)
    before = fingerprint(model)  # now, since some keep what they made in their first forward
    record: dict[str, Any] = {"status": "served"}
    try:
        found, run = under(Look(), backend="reference")
    except HeedfulError as refusal:
        if "; its own are" not in str(refusal) and "calls no attention" in str(refusal):
            return record | {"status": "no attention"}
        record |= {"status": "refused", "reason": _short(str(refusal))}
        if (only := _suggestion(str(refusal))) is None:
            return record
        try:
            found, run = under(Look(), backend="reference")
        except HeedfulError as second:
            return record | {"reason": _short(str(second))}
        record["status"] = "served in part"
    entered = run.activity().entered
    record |= {"layers": len(run.layer_names), "entered": len(entered)}
    wrong = [] if len(entered) == len(run.layer_names) else ["a layer was not entered"]
    wrong += [] if _near(case, found, native) else ["passed through"]
    wrong += [] if _near(case, under(Look(), tile_rows=TILE_ROWS)[0], native) else ["read in tiles"]
    wrong += [] if _same(under(Look().when("decode"))[0], slow) else ["left alone"]
    for method in (DropPattern(), DropHeads()):
        if _same(under(method)[0], native):
            wrong.append(f"{method!r} moved nothing")
    if not _same(_tensors(case.call()), native):
        wrong.append("not as before after close")
    if fingerprint(model) != before:
        wrong.append("something stayed in the model")
    return record | ({"status": "wrong", "reason": "; ".join(wrong)} if wrong else {})


def _slow(case: cases.Case) -> list[Tensor]:
    """What it gives without torch's fast path, which rests under a run."""
    kept = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return _tensors(case.call())
    finally:
        torch.backends.mha.set_fastpath_enabled(kept)


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(close(a, b, ROUNDINGS * DEPTH) for a, b in zip(found, wanted, strict=True))


def _near(case: cases.Case, found: list[Tensor], native: list[Tensor]) -> bool:
    """Within the budget, or no further than torch's formula is from its kernel: wide layers carry roundings far."""
    if _close(found, native):
        return True
    with sdpa_kernel(SDPBackend.MATH):
        formula = _tensors(case.call())
    return len(found) == len(native) and all(map(_no_further, found, formula, native))


def _no_further(found: Tensor, other: Tensor, native: Tensor) -> bool:
    return error(found, native) <= error(other, native) < float("inf")


def _short(refusal: str) -> str:
    """The kinds of module that a refusal names, and why."""
    found = sorted(set(re.findall(r"\((\w+: [^)]*)\)", refusal)))
    return "; ".join(found) or refusal[:160]


def main() -> None:
    warnings.simplefilter("ignore", InactiveWarning)
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    record, given = Record.read(), sys.argv[1:]
    if given[:1] == ["look"]:
        look_at_all(record, "".join(given[1:]))
    else:
        measure_all(record, "".join(given))


if __name__ == "__main__":
    main()
