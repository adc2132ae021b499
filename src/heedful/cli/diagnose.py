"""`heedful diagnose [MODEL]`: what a model's attention does on a text, in words and as a page."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from heedful.cli.console import console, require_page, stopping, tell, workers_from, write_page
from heedful.cli.pictured import pictured
from heedful.cli.progress import Bars
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.files import is_there

if TYPE_CHECKING:
    from torch import Tensor

    from heedful.core.entry import CatalogueEntry
    from heedful.core.kinds.weights import Measure
    from heedful.diagnosis.profile import Profile
    from heedful.models import Loaded

DRAWN = 256  # tokens for a model without a tokenizer
UNKNOWN = 0.1  # share of the built-in text that a tokenizer may have no token for
OTHERS = {
    "images": ("image", "photos", "vision"),
    "audio": ("sound", "clips", "speech"),
}  # and a model
STAGES = {
    "text": ("reading the text", "tokens"),
    "images": ("reading the images", "tokens"),
    "sounds": ("reading the sounds", "tokens"),
    "corpus": ("reading the corpus", "shards"),
    "trials": ("trying prompts", "tokens"),
    "weights": ("looking at weights", ""),
    "view": ("following heads", "tokens"),
}


def measures_from(text: str) -> list[Measure] | None:
    """Measures by name, parted by commas, with settings if they follow; none for the default ones."""
    from heedful.catalogue import entry_from, parted
    from heedful.core.kinds.weights import Weights
    from heedful.core.method import Method

    parts: list[Measure] = []
    for name in parted(text):
        entry: CatalogueEntry = entry_from(name)
        if not isinstance(entry, Method | Weights):
            raise FieldError("diagnose", "measures", name, f"is {entry.kind}, which reads nothing", "SinkRate")
        parts.append(entry)
    return parts or None


def summary(profile: Profile, page: Path | None) -> str:
    """The profile for machines: facts, findings and roles."""
    from heedful.core.figures import head_name

    found = {
        "facts": {key: value for key, value in profile.facts.items() if key != "settings"},
        "measures": [repr(part) for part in profile.parts],
        "findings": [{"text": f.text, "weight": f.weight, "methods": f.methods} for f in profile.findings()],
        "roles": [
            {"name": role.name, "heads": {head_name(*head): strength for head, strength in role.heads.items()}}
            for role in profile.roles()
        ],
        "page": page and str(page),
    }
    return json.dumps(found, indent=1)


def built_in(loaded: Loaded) -> str | Tensor:
    """What is read where no text is given: ours, or drawn tokens where no tokenizer knows words."""
    from heedful.core.kinds.loaded import words_of

    if (tokenizer := words_of(loaded.tokenizer)) is not None:
        text = files("heedful").joinpath("cli/text.txt").read_text(encoding="utf-8")
        if (unknown := tokenizer.unk_token_id) is not None:
            ids = tokenizer(text, verbose=False).input_ids
            if (share := ids.count(unknown) / len(ids)) > UNKNOWN:
                raise HeedfulError(
                    f"{loaded.name} reads other texts than English: its tokenizer makes {share:.0%} of the built-in "
                    f"text {tokenizer.unk_token}. Name a text for it: --text FILE"
                )
        return text
    import torch

    table = loaded.model.get_input_embeddings()
    if not isinstance(table, torch.nn.Embedding):
        return ""
    return torch.randint(table.num_embeddings, (DRAWN,), generator=torch.Generator().manual_seed(0))


def require_files(given: dict[str, Path]) -> None:
    """Refuse what holds nothing to read before a model is loaded."""
    from heedful.diagnosis import images, texts, waves

    readable = {
        "text": ("book.txt", texts.ENDINGS),
        "images": (OTHERS["images"][1], images.ENDINGS),
        "audio": (OTHERS["audio"][1], waves.ENDINGS),
    }
    for option, (good, endings) in readable.items():
        path = given.get(option)
        if path is None:
            continue
        if not is_there(path):
            missing = f"--{option}: there is no file or folder '{path}'"
            raise HeedfulError(f"{missing}. Name one that exists, as in --{option} {good}")
        if path.is_dir() and not texts.files_in(path, endings):
            raise HeedfulError(f"--{option} {path}: the folder holds no file that ends in {', '.join(endings)}")
    if (path := given.get("text")) is not None and path.is_file():
        text, why = texts.read_text(path)
        if why:
            raise HeedfulError(f"--text {path}: {why}, as in --text {readable['text'][0]}")
        if key := texts.key_of_lines(path, text):
            column = "" if key == "text" else f" --column {key}"
            raise HeedfulError(f"--text {path}: {texts.LINED}, as in --corpus {path}{column}")


def pick(model: str, loaded: Loaded, given: dict[str, Path]) -> Path | str | Tensor:
    """What the model reads, where no corpus is, of what is `given` by option."""
    from heedful.explaining.aim import read_by

    mine = next((option for option, (thing, *_) in OTHERS.items() if thing == read_by(loaded.model)), "text")
    if mine == "text" and mine in given and loaded.tokenizer is None:
        raise HeedfulError(
            f"--text {given['text']}: {loaded.name} has no tokenizer, and reads no words. Leave it out, or name a "
            "model that has one, as in heedful diagnose default --text book.txt"
        )
    if mine in given:
        return given[mine]
    if mine != "text":
        thing, good, _ = OTHERS[mine]
        raise HeedfulError(
            f"{loaded.name} reads {thing}s. Name one, or a folder of them: heedful diagnose {model} --{mine} {good}"
        )
    for option, (thing, good, example) in OTHERS.items():
        if option in given:
            raise HeedfulError(
                f"--{option} {given[option]}: {loaded.name} reads text. Leave it out, or name a model that reads "
                f"{thing}s, as in heedful diagnose {example} --{option} {good}"
            )
    return built_in(loaded)


def diagnose(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name or folder, 'default', 'encoder' or 'tiny:llama'.")] = (
        "default"
    ),
    text: Annotated[
        Path | None,
        typer.Option(help="A file, or a folder of texts; one is built in."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="An image or a folder of them, for a model that reads images, such as 'vision'."),
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(help="A WAV file or a folder of them, for a model that hears, such as 'speech'."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts, one a line, for a text-to-image pipeline: a picture of each, word by word."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Many texts instead: a JSONL or Parquet file, or a folder of these or of texts."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="What the corpus calls its texts; text if left out.")] = None,
    workers: Annotated[int | None, typer.Option(help="So many processes read the corpus, by Ray.")] = None,
    ray: Annotated[str, typer.Option(help="Workers of the Ray cluster at this address; auto finds it.")] = "",
    length: Annotated[int | None, typer.Option(help="Tokens that one forward reads at most; 2048 if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the profile here, and go on here if stopped.")] = None,
    measures: Annotated[str, typer.Option(help="Which ones, as in 'SinkRate(epsilon=0.2),AttentionProfile'.")] = "",
    backend: Annotated[str, typer.Option(help="Demand a backend.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary for machines.")] = False,
    page: Annotated[bool, typer.Option(help="Write the page.")] = True,
) -> None:
    """Tell what a model's attention does: where it parks, what each head is for, what stands out."""
    if context.args:
        extra = " ".join(context.args)
        raise HeedfulError(f"{extra}: one model is named. What it reads goes by an option: --text {extra}")
    parts = measures_from(measures)
    if page:
        require_page()
    named = {"text": text, "images": images, "audio": audio, "prompts": prompts, "corpus": corpus}
    given = {option: path for option, path in named.items() if path is not None}
    if len(given) > 1:
        both = " ".join(f"--{option} {path}" for option, path in given.items())
        raise HeedfulError(f"{both}: one of them is read. Leave the rest out")
    require_files(given)
    if corpus is None and (workers is not None or ray):
        raise HeedfulError("--workers and --ray share a corpus, and there is none. Name one: --corpus texts.jsonl")
    if corpus is None and column is not None:
        raise HeedfulError(f"--column {column}: is of a corpus, and there is none. Name one: --corpus texts.jsonl")
    shared = workers_from(workers, ray)
    if prompts is not None:
        rest = {"measures": measures, "length": length, "backend": backend != "auto"}
        if taken := [f"--{name}" for name, value in rest.items() if value]:
            raise HeedfulError(f"{', '.join(taken)}: not with --prompts, which tells of words alone. Leave it out")
        pictured(model, prompts, out, as_json, page)
        return
    bars = Bars(STAGES)
    with bars.console.status(f"loading {escape(model)}"):
        from heedful import models
        from heedful.diagnosis.corpus import Corpus
        from heedful.diagnosis.run import diagnose as run

        asked = Corpus(corpus, column or "text") if corpus is not None else None
        loaded = models.load(model)
    with stopping(bars, out):
        profile = run(
            loaded,
            asked or pick(model, loaded, given),
            measures=parts,
            length=length,
            out=out,
            workers=shared,
            progress=bars,
            backend=backend,
        )
    where = write_page(profile, "diagnose", loaded.name, out) if page else None
    if as_json:
        typer.echo(summary(profile, where))
        return
    tell(profile, where)
    if out is not None:
        console.print(f"The profile: {out.resolve()}", markup=False)
