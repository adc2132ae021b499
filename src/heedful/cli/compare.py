"""`heedful compare [MODEL]`: which methods help a model on which tasks, and what they cost."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from heedful.cli.console import console, require_page, stopping, tell, workers_from, write_page
from heedful.cli.progress import Bars
from heedful.cli.ranges import ranged
from heedful.core.errors import FieldError, HeedfulError

if TYPE_CHECKING:
    from heedful.bench.comparison import Comparison
    from heedful.models import Loaded
    from heedful.tasks.task import Task
    from heedful.text_models import Contender

TASKS = "needle,recall,loss"  # where nobody names any
STAGES = {"fits": ("fitting", ""), "answers": ("asking", "answers"), "costs": ("measuring costs", "")}


def summary(comparison: Comparison, page: Path | None) -> str:
    """The comparison for machines."""
    found = {
        "facts": comparison.facts,
        "verdicts": {name: comparison.verdict(name) for name in comparison.contenders[1:]},
        "findings": [finding.text for finding in comparison.description().findings],
        "results": [asdict(result) for result in comparison.results],
        "costs": [asdict(price) for rows in comparison.batches for price in comparison.priced[rows]],
        "refused": [asdict(refused) for refused in comparison.refused],
        "page": page and str(page),
    }
    return json.dumps(_finite(found), indent=1)


def _finite(x: Any) -> Any:
    """The same with null for ends that an interval of few prompts does not have."""
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _named(text: str) -> list[Contender]:
    """What a text stands for; of a room those that take its settings, with a line for each that does not."""
    from heedful.catalogue import in_room, stack_from

    living = in_room(text)
    if living == [text]:
        return [stack_from(one) for one in ranged(text)]
    found = []
    for one in living:
        try:
            found += [stack_from(each) for each in ranged(one)]
        except FieldError as reason:
            typer.echo(f"left out: {reason}", err=True)
    return found


def _sizes(text: str) -> list[int]:
    """The sizes of batches that are parted by commas."""
    from heedful.catalogue import parted

    try:
        return [int(one) for one in parted(text)]
    except ValueError:
        raise FieldError("compare", "--batch", text, "must be whole numbers, parted by commas", "1,4,16") from None


def _fitted(loaded: Loaded, what: Contender, bars: Bars, only: str | None) -> Contender:
    """The contender fitted to prose; as it was, with a note, where it needs more than that."""
    from heedful.bench.fitting import fitted

    try:
        return fitted(loaded, what, bars, only)
    except HeedfulError as reason:
        bars.console.print(f"tried without a fit: {reason}", markup=False)
        return what


def _found(text: str) -> Task:
    """The task of that name, or of that file."""
    from heedful.tasks import find, named_as

    with named_as("compare", "--tasks"):
        return find(text)


def _model_for(tasks: list[Task]) -> str:
    """The model that comes along for these, where nobody named one."""
    by_model = {task.model: task.title for task in tasks}
    if len(by_model) > 1:
        told = ", ".join(f"{name} for {title}" for name, title in by_model.items())
        rule = f"are for unlike models ({told}): ask one after the other, or name a model that takes them all"
        raise FieldError("compare", "--tasks", ",".join(task.name for task in tasks), rule, tasks[0].name)
    return next(iter(by_model))


def _taken(loaded: Loaded, text: str, bars: Bars) -> list[Task]:
    """The task, or those of a range that are short enough for the model."""
    from heedful.bench.compare import fits
    from heedful.diagnosis.texts import positions

    found = [_found(one) for one in ranged(text, positions(loaded.model))]
    long = [task for task in found[1:] if not fits(loaded, task)]
    for task in long:
        bars.console.print(f"left out: {task} is longer than the model takes", markup=False)
    return [task for task in found if task not in long]


def compare(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model's name or folder: of text, text and pictures, pictures, speech; if left out, the one that "
            "comes along for the tasks."
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Parted by commas, joined by |, as in 'act,snapkv(budget=0.1..0.75)|tempscale'; or rooms."),
    ] = "",
    preset: Annotated[
        str, typer.Option(help="Methods and tasks of a paper, where you name none; `--preset list` has them.")
    ] = "",
    tasks: Annotated[
        str,
        typer.Option(
            help="Parted by commas: names (`--tasks list` has them), or files and folders of your own, of text, sounds "
            "or pictures; if left out, needle, recall and loss."
        ),
    ] = "",
    prompts: Annotated[int, typer.Option(help="Of each task at most; asking ends when the verdicts are known.")] = 300,
    minutes: Annotated[float, typer.Option(help="How long to ask in this call, at most.")] = 10.0,
    margin: Annotated[float, typer.Option(help="How much worse is safe: of a share, or nats.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Draws other prompts.")] = 0,
    turns: Annotated[int, typer.Option(help="How often costs are measured; 0 for not at all.")] = 3,
    batch: Annotated[str, typer.Option(help="Measure costs of so many rows at once, as in '1,4,16'.")] = "1",
    cache: Annotated[
        str | None, typer.Option(help="How much a batch's cache may take, as in '4GB'; what fits and holds is named.")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Fit what can be fitted to plain prose first.")] = False,
    only: Annotated[str | None, typer.Option(help="Serve this part of the model alone, as in 'model.layers'.")] = None,
    backend: Annotated[str, typer.Option(help="Demand one, as in 'tiled'.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Keep the records here, and go on here if stopped.")] = None,
    workers: Annotated[int | None, typer.Option(help="So many processes ask, by Ray; costs are measured here.")] = None,
    ray: Annotated[str, typer.Option(help="Workers of the Ray cluster at this address; auto finds it.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results for machines.")] = False,
    page: Annotated[bool, typer.Option(help="Write the page.")] = True,
) -> None:
    """Ask the unedited model and every method the same prompts; tell what each wins, loses and costs."""
    from heedful.bench.presets import PRESETS
    from heedful.bench.presets import preset as preset_of
    from heedful.catalogue import parted
    from heedful.tasks import Task, known

    if preset.strip() == "list":
        for each in PRESETS.values():
            console.print(f"{each.name:<22} {each.about} {each.paper.link}", markup=False)
        return
    if preset:
        chosen = preset_of(preset.strip())
        methods, tasks = methods or chosen.methods, tasks or chosen.tasks
    tasks = tasks or TASKS
    if tasks.strip() == "list":
        for name, kind in known().items():
            of = "" if kind.model == Task.model else f" Asked of the model {kind.model!r} where none is named."
            console.print(f"{name:<22} {kind.about}{of}", markup=False)
        return
    contenders = [what for text in parted(methods) for what in _named(text)]
    if not contenders:
        raise FieldError("compare", "--methods", methods, "must name one or more", "act,snapkv(budget=0.25)")
    if not parted(tasks):
        raise FieldError("compare", "--tasks", tasks, "must name one or more", TASKS)
    # what is wrong is named before the model loads
    first = [_found(ranged(text, most=1 << 30)[0]) for text in parted(tasks)]
    model = _model_for(first) if model is None else model
    from heedful.bench.compare import costed, require_counts
    from heedful.bench.results import PLAIN
    from heedful.core.files import folder_for

    require_counts(prompts, minutes, margin, turns, backend)
    folder_for("compare", out)

    if page:
        require_page()
    shared = workers_from(workers, ray)
    batches, limit = costed(_sizes(batch), cache, turns)
    bars = Bars(STAGES)
    with bars.console.status(f"loading {escape(model)}"):
        from heedful import models
        from heedful.bench.compare import compare as run
        from heedful.bench.compare import require, require_reader

        loaded = models.load(model)
        require_reader(loaded, "compare", "MODEL", "default")
        asked = [task for text in parted(tasks) for task in _taken(loaded, text, bars)]
        require(loaded, asked, prompts, minutes, margin, turns, {"only": only, "backend": backend})
    with stopping(bars, out):
        if fit:
            contenders = [_fitted(loaded, what, bars, only) for what in contenders]
        found = run(
            loaded, contenders, asked, prompts=prompts, minutes=minutes, margin=margin, seed=seed, turns=turns, out=out,
            batch=batches, cache=limit, workers=shared, progress=bars, only=only, backend=backend,
        )  # fmt: skip
    where = write_page(found, "compare", loaded.name, out) if page else None
    if as_json:
        typer.echo(summary(found, where))
    else:
        tell(found, where)
    if all(r.contender == PLAIN for r in found.results):
        raise typer.Exit(1)  # whoever scripts this learns that no method could be asked anything
