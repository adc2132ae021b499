"""`heedful doctor [MODEL]`: the machine, the backends, and whether a model is served."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.markup import escape

from heedful.cli.console import console
from heedful.core.errors import ModelError


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def doctor(
    model: Annotated[str, typer.Argument(help="A name or folder, 'default', 'tiny:llama', or 'timm:NAME'.")] = "",
) -> None:
    """Show versions, device and backends, and say of a model which layers are served, or why it is refused."""
    import torch

    from heedful.core.figures import counted
    from heedful.engine.backends import BACKENDS
    from heedful.models.copies import cache_folder
    from heedful.native import Library, library

    cores = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.machine()}, {cores} cores, {device}"
    console.print(f"heedful {_version('heedful')}, Python {platform.python_version()}, {machine}")
    console.print(", ".join(f"{p} {_version(p)}" for p in ("torch", "transformers", "safetensors", "gguf", "rich")))
    kernel = library()
    told = f"on {kernel.path}" if isinstance(kernel, Library) else kernel
    console.print(f"native kernel: {told}", markup=False)
    held = [file.stat().st_size for file in cache_folder().glob("*/model.safetensors")]
    size = f"{counted(len(held), 'model')} unpacked, {sum(held) / 2**30:.1f} GiB"
    console.print(f"copies: {size} in {cache_folder()}; what is deleted there is unpacked again", markup=False)
    known = ", ".join(BACKENDS)
    console.print(f"backends: {known}; `heedful explain METHOD` says which one serves a method, and why")
    if not model:
        return None
    if model.startswith("timm:"):
        return _served_of_timm(model.removeprefix("timm:"))
    from heedful import models
    from heedful.adapters.choosing import adapter_for
    from heedful.adapters.projections import projections

    with console.status(f"loading {escape(model)}"):
        loaded = models.load(model)
    adapter = adapter_for(loaded.model)
    kind = type(loaded.model).__name__
    served = counted(len(adapter.layer_names), "attention layer")
    console.print(f"[green]served[/]: {served} of {kind} ({escape(loaded.name)})")
    if adapter.unseen:
        first, more = adapter.unseen[0], len(adapter.unseen) - 1
        which = f"{first} and {more} more compute" if more else f"{first} computes"
        console.print(f"[yellow]not looked at yet[/]: {which} attention by itself, as the first call will show")
    try:
        sizes = {(s.heads, s.kv_heads, s.head_dim) for s in adapter.sizes()}
    except ModelError as reason:
        console.print(f"[yellow]no learned parameters[/]: {escape(str(reason))}")
    else:
        console.print("; ".join(f"{h} query heads, {g} key heads, {d} wide" for h, g, d in sorted(sizes)))
    try:
        for name in adapter.layer_names:
            projections(loaded.model, name, 0)
    except ModelError as reason:
        console.print(f"[yellow]no surgery[/]: {escape(str(reason))}")


def _served_of_timm(name: str) -> None:
    """The layers of a model of timm, found by running it with random weights."""
    import torch

    from heedful.adapters.choosing import adapter_for

    try:
        import timm

        made = timm.create_model(name).eval()
    except (ImportError, RuntimeError) as error:
        wants = "; timm wants torchvision, in the build of your torch (docs/vision.md)"
        way = wants if "torchvision" in str(error) else ""
        raise ModelError(f"timm:{name}: {error}{way}") from error
    pictures = torch.zeros(2, *made.default_cfg["input_size"])  # one does not tell how several stand beside the heads
    with console.status(f"running {escape(name)}"):
        adapter = adapter_for(made, None, pictures)
    names, sizes = adapter.layer_names, {(s.heads, s.kv_heads, s.head_dim) for s in adapter.sizes()}
    console.print(
        f"[green]served[/]: {len(names)} attention layers of {type(made).__name__}, {names[0]} to {names[-1]}"
    )
    console.print("; ".join(f"{h} query heads, {g} key heads, {d} wide" for h, g, d in sorted(sizes)))
