"""Models of other libraries under heedful: one of each file of timm, and classes of diffusers and open_clip.

    python -m benchmarks.coverage.libraries [NAME]     measures what is new (or the names that match); it resumes

Writes benchmarks/records/libraries.json, of which `make docs` makes its section of docs/coverage.md.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import heedful
from benchmarks.beside_torch import library
from heedful.adapters.kvcache import tensors_in
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import DEPTH, ROUNDINGS, close
from heedful.core.errors import HeedfulError, InactiveWarning

from . import library_cases as cases
from .probe import TILE_ROWS, DropHeads, DropPattern, Look, _suggestion
from .rows import LIBRARIES

SMALLEST = ("atto", "femto", "pico", "nano", "xxtiny", "xxs", "xtiny", "xs", "tiny", "mini", "_s", "small", "base", "")
MADE: dict[str, dict[str, Callable[[], cases.Case]]] = {
    "diffusers": {
        "AutoencoderKL": cases.autoencoder, "DiTTransformer2DModel": cases.dit, "FluxTransformer2DModel": cases.flux,
        "PixArtTransformer2DModel": cases.pixart, "SD3Transformer2DModel": cases.sd3,
        "UNet2DConditionModel": cases.unet, "UNet2DModel": cases.unet2d,
    },
    "open_clip": {"CLIP": cases.clip},
}  # fmt: skip


def of_timm() -> dict[str, Callable[[], cases.Case]]:
    """The smallest model of each file of timm, as far as names tell."""
    timm = library("timm")
    found = {}
    for module in sorted(set(timm.list_modules())):
        names = timm.list_models(module=module)
        if names:
            name = next(n for word in SMALLEST for n in names if word in n)
            found[name] = lambda name=name: _built(name)
    return found


def _built(name: str) -> cases.Case:
    timm = library("timm")
    try:
        model = timm.create_model(name, depth=2)
    except (TypeError, ValueError, AssertionError, RuntimeError):  # a class that cannot be told its depth
        model = timm.create_model(name)
    model = cases.drawn(model, 0.05)
    x = cases.draw(1, *model.default_cfg["input_size"])
    return cases.Case(model, lambda: model(x), 0)


def _tensors(answer: Any) -> list[Tensor]:
    found = [x for x in tensors_in(answer) if x.is_floating_point()]
    if not found:
        raise ValueError(f"no tensor in an answer of {type(answer).__name__}, so nothing can be compared")
    return found


@torch.no_grad()
def examine(case: cases.Case) -> dict[str, Any]:
    """The same questions as for transformers' classes."""
    model, only = case.model, None

    def under(what: Any, **how: Any) -> tuple[list[Tensor], Any]:
        with heedful.attach(model, what, only=only, inputs=case.call, **how) as run:
            return _tensors(case.call()), run

    before, native = fingerprint(model), _tensors(case.call())
    record: dict[str, Any] = {"status": "served", "class": type(model).__name__}
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
    wrong = [] if _close(found, native) else ["passed through"]
    wrong += [] if _close(under(Look(), tile_rows=TILE_ROWS)[0], native) else ["read in tiles"]
    wrong += [] if _close(under(Look().when("decode"))[0], native) else ["left alone"]
    for method in (DropPattern(), DropHeads()):
        if all(torch.equal(a, b) for a, b in zip(under(method)[0], native, strict=True)):
            wrong.append(f"{method!r} moved nothing")
    if not all(torch.equal(a, b) for a, b in zip(_tensors(case.call()), native, strict=True)):
        wrong.append("not as before after close")
    if fingerprint(model) != before:
        wrong.append("something stayed in the model")
    return record | ({"status": "wrong", "reason": "; ".join(wrong)} if wrong else {})


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(close(a, b, ROUNDINGS * DEPTH) for a, b in zip(found, wanted, strict=True))


def _short(refusal: str) -> str:
    """The kinds of module that a refusal names, and why."""
    found = sorted(set(re.findall(r"\((\w+: [^)]*)\)", refusal)))
    return "; ".join(found) or refusal[:160]


def measured(pattern: str) -> Iterator[dict[str, Any]]:
    """A record for each model that matches and is not in the file yet."""
    done = {(r["library"], r["name"]) for r in read()}
    for source, makers in {"timm": of_timm(), **MADE}.items():
        for name, make in makers.items():
            if (source, name) in done or not re.search(pattern, name):
                continue
            start = time.perf_counter()
            try:
                case = make()
                case.call()
            except Exception as error:  # noqa: BLE001 - whatever ends it is its reason
                record = {"status": "cannot build", "reason": f"{type(error).__name__}: {str(error)[:120]}"}
            else:
                record = examine(case)
            yield {"library": source, "name": name, **record, "seconds": round(time.perf_counter() - start, 1)}


def read() -> list[dict[str, Any]]:
    return json.loads(LIBRARIES.read_text())["models"] if LIBRARIES.exists() else []


def main() -> None:
    warnings.simplefilter("ignore", InactiveWarning)
    warnings.filterwarnings("ignore")
    names = {"timm": "timm", "diffusers": "diffusers", "open_clip": "open-clip-torch", "torch": "torch"}
    for record in measured(sys.argv[1] if len(sys.argv) > 1 else ""):
        print(
            record["library"], record["name"], record["status"], record.get("reason", ""), record["seconds"], flush=True
        )
        told = {
            "date": time.strftime("%Y-%m-%d"), "versions": {n: version(p) for n, p in names.items()},
            "models": sorted([*read(), record], key=lambda r: (list(names).index(r["library"]), r["name"])),
        }  # fmt: skip
        LIBRARIES.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
