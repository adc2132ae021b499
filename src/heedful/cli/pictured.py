"""`heedful diagnose PIPELINE --prompts FILE`: what each word is for a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from heedful.cli.console import console, tell, write_page
from heedful.core.errors import HeedfulError, first_line


def prompts_from(path: Path) -> list[str]:
    """A file's lines, but for empty ones."""
    if not path.is_file():
        raise HeedfulError(
            f"--prompts: there is no file '{path}'. Name one with a prompt a line: --prompts prompts.txt"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as wrong:
        raise HeedfulError(f"--prompts {path}: is no text in UTF-8. Name a file with a prompt a line") from wrong
    if not (found := [line for line in lines if line]):
        raise HeedfulError(f"--prompts {path}: holds no prompt. Write one a line, such as: a red cube on a blue table")
    return found


def pipeline(name: str) -> Any:
    """A text-to-image pipeline by its folder or its name on the hub; code that comes with it is not run."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError as missing:
        raise HeedfulError(
            "diffusers is not installed, and --prompts is for its pipelines: pip install 'heedful[diffusion]'"
        ) from missing
    try:
        return DiffusionPipeline.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, ImportError) as wrong:
        raise HeedfulError(
            f"{name} is no text-to-image pipeline that diffusers can load. Name one on the hub, or a folder with "
            f"model_index.json ({first_line(wrong)})"
        ) from wrong


def pictured(model: str, prompts: Path, out: Path | None, as_json: bool, page: bool) -> None:
    """Make a picture of each prompt, and tell what its words did."""
    from heedful.explaining.picturing import word_maps

    given = prompts_from(prompts)
    with console.status(f"loading {escape(model)}"):
        pipe = pipeline(model)
    found = word_maps(pipe, given)
    where = write_page(found, "diagnose", Path(model).name, out) if page else None
    if as_json:
        told = [
            {
                "prompt": one.prompt,
                "words": [
                    {"word": word, "share": float(x.mean()), "by step": step.tolist(), "by layer": layer.tolist()}
                    for word, x, step, layer in zip(one.words, one.maps, one.steps.T, one.layers.T, strict=True)
                ],
            }
            for one in found
        ]
        typer.echo(json.dumps({"facts": dict(found.facts), "prompts": told, "page": where and str(where)}, indent=1))
        return
    tell(found, where)
