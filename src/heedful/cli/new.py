"""`heedful new method NAME`: a method's file, its test and its claim, to be filled in."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from heedful.cli.console import console
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.rooms import rooms

NUMBER = "0000.00000"  # where no paper is named
METHOD = Template('''"""The formula in one line."""

from __future__ import annotations

from torch import Tensor

from heedful.authoring import Call, Method, Paper, PositiveFloat, Site, at


class $name(Method):
    """What it does, in one sentence."""

    paper = Paper("$key", "The Paper's Title", "Ada Author, Bo Writer", $year, "$arxiv", differs=())
    factor: PositiveFloat = 1.1  # what it is, with its unit; the paper's default

    @classmethod
    def neutral(cls) -> $name:
        return cls(1.0)

    @classmethod
    def example(cls) -> $name:
        return cls(2.0)

    @at(Site.SCORES)
    def sharpen(self, scores: Tensor, call: Call) -> Tensor:
        return scores * self.factor


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    with attach(model, $name()) as run:
        print(run.difference(**tokenizer("Paris is the capital of", return_tensors="pt")))
''')

TEST = Template('''"""$name against a reading of the paper that was written apart from the class."""

from __future__ import annotations

import torch

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from $module import $name


def by_hand(call: Bare, factor: float) -> torch.Tensor:
    """The paper's formula in loops, from queries, keys and values."""
    b, h, n, d = call.q.shape
    out = torch.zeros(b, h, n, call.v.shape[-1])
    for text in range(b):
        for head in range(h):
            k, v = (x[text, head * x.shape[1] // h] for x in (call.k, call.v))
            for i in range(n):
                scores = factor * call.q[text, head, i] @ k[: i + 1].T * d**-0.5
                out[text, head, i] = torch.softmax(scores, -1) @ v[: i + 1]
    return out


def test_it_is_the_papers_formula() -> None:
    call = Bare()
    found, _ = call.run($name(1.7), "reference")
    assert close(found, by_hand(call, 1.7))
''')

CLAIM = Template('''"""$name: the question that this claim asks, in one sentence."""

from __future__ import annotations

from claims.ledger import Claim, run
from $module import $name


def measure(seed: int) -> tuple[float, dict[str, float]]:
    """One effect of $name, and the numbers behind it; a seed draws new data."""
    raise SystemExit("claims/$claim.py: measure the paper's claim here")


CLAIM = Claim(
    key="$key",
    method="$name",
    says="What the paper claims, in one sentence.",
    paper_number="its own figure, or 'none given'",
    setup="The model, the data, and the control that makes the claim the paper's own.",
    effect="name and unit, above zero where the paper is right",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
''')


def snake(name: str) -> str:
    """A class's name as its file's: SnapKV is snap_kv."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def method(
    name: Annotated[str, typer.Argument(help="The class's name, which is the paper's for the method: 'SnapKV'.")],
    family: Annotated[str, typer.Option(help="The room below methods/ it goes into.")] = "intervene/language",
    key: Annotated[str, typer.Option(help="What names the paper: its arXiv number, as 2404.14469.")] = NUMBER,
    root: Annotated[Path, typer.Option(help="The clone.")] = Path(),
) -> None:
    """Write the file, the test and the claim of a method; nothing that exists is touched."""
    from heedful.catalogue import entries

    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name):
        raise FieldError("heedful new method", "name", name, "must be the name of a class", "SnapKV")
    if name in entries():
        raise FieldError("heedful new method", "name", name, f"exists, in {entries()[name].__module__}", f"{name}2")
    home = root / "src" / "heedful" / "methods"
    if not home.is_dir():
        raise FieldError("heedful new method", "--root", str(root), "must be a clone of heedful", "path/to/clone")
    if family not in (known := rooms(home)):
        rule = f"must be one of {', '.join(known)}"
        raise FieldError("heedful new method", "--family", family, rule, "intervene/language")
    stem = snake(name)
    module = ".".join(("heedful", "methods", *Path(family).parts, stem))
    arxiv = key if re.fullmatch(r"\d{4}\.\d{4,5}", key) else NUMBER
    paper = Paper(key, "The Paper's Title", "", 2026)
    words = {"name": name, "key": key, "arxiv": arxiv, "claim": paper.claim, "module": module, "year": 2026}
    claim = root / "claims" / f"{paper.claim}.py"
    files = {home / family / f"{stem}.py": METHOD, root / "tests" / "methods" / f"test_{stem}.py": TEST, claim: CLAIM}
    if claim.exists():
        raise FieldError("heedful new method", "--key", key, f"would write over {claim}", "2404.14469")
    if there := [path for path in files if path.exists()]:
        raise FieldError("heedful new method", "name", name, f"would write over {there[0]}", f"{name}2")
    for path, template in files.items():
        path.write_text(template.substitute(words))
        console.print(f"wrote {path}", markup=False)
    console.print(f"next: fill them in, then `heedful check {name}`", markup=False)
