"""The catalogue's pages: an index, and a page a family that opens with its hand-written 'How to choose'."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path

from claims.ledger import RESULTS
from heedful.catalogue import entries, family
from heedful.cli.methods import sites
from heedful.cli.show import settings
from heedful.core.entry import CatalogueEntry
from heedful.core.paper import Paper
from heedful.functions import functions

CHOOSE = Path(__file__).parent / "choose"
FAMILIES = {
    "mechanisms": "Attention computed otherwise, by gates, linear maps, convolutions or another normalisation.",
    "sparse": "Fewer pairs computed or fewer entries cached, for the same weights.",
    "intervene": "A trained model's behaviour moved, while it runs or in its weights.",
    "compress": "A model made cheaper: parts of its attention taken out, or another attention taught to it.",
    "observe": "What attention does, counted while the model runs as it is.",
    "explain": "What an output owes to which token or head.",
}


def cell(text: str, most: int = 160) -> str:
    """Text for one cell of a table, cut at a word where it is longer."""
    return textwrap.shorten(text.replace("|", r"\|"), most, placeholder=" ...")


def what(kind: type[CatalogueEntry]) -> str:
    """The first sentence of the docstring, short enough for a table."""
    first = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return cell(re.split(r"(?<=[.!?])\s", first)[0], 90)


def verdicts() -> dict[str, str]:
    """What the ledger found about each method: once where all claims about it agree, else with each claim's key."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["method"], []).append((record["key"], record["verdict"]))
    return {name: together(claims) for name, claims in found.items()}


def together(claims: list[tuple[str, str]]) -> str:
    """The verdicts of the claims about one method, in a few words."""
    first = claims[0][1]
    if len({verdict for _, verdict in claims}) > 1:
        return ", ".join(f"{key}: {verdict}" for key, verdict in claims)
    return first if len(claims) == 1 else f"{len(claims)} claims: {first}"


def members() -> dict[str, dict[str, type[CatalogueEntry]]]:
    """The entries of each family, in the order of the index."""
    out: dict[str, dict[str, type[CatalogueEntry]]] = {name: {} for name in FAMILIES}
    for name, kind in entries().items():
        if family(kind) not in out:
            raise SystemExit(f"family {family(kind)!r} of {name} has no sentence: add it to FAMILIES in {__file__}")
        out[family(kind)][name] = kind
    return out


def index() -> str:
    """The families, a sentence and a table each."""
    rows = ["# Methods\n", "Each family has a page that tells how to choose and then describes every method."]
    rows += ["What is no method but a function of the library has [a page too](functions.md).\n"]
    for name, kinds in members().items():
        rows += [f"## [{name}](methods/{name}.md)\n", FAMILIES[name] + "\n"]
        rows += ["| name | what it does | acts at | paper |", "|---|---|---|---|"]
        for method, kind in kinds.items():
            link = f"[{method}](methods/{name}.md#{method.lower()})"
            papers = " ".join(f"[{paper.key}]({paper.link})" for paper in kind.paper.every)
            rows.append(f"| {link} | {what(kind)} | {sites(kind)} | {papers} |")
        rows.append("")
    return "\n".join(rows)


def prose(name: str, known: dict[str, type[CatalogueEntry]]) -> str:
    """'How to choose', where `{Method}` becomes a link to its section with the verdict of its claim."""
    told = verdicts()

    def mention(found: re.Match[str]) -> str:
        method = found[1]
        if method not in known:
            raise SystemExit(f"docs/choose/{name}.md names {{{method}}}, which is not in the family {name}")
        return f"[{method}](#{method.lower()}) (*{told.get(method, 'no claim measured')}*)"

    note, text = (CHOOSE / f"{name}.md").read_text().split("\n\n", 1)
    if not note.startswith(f"> This is read in [docs/methods/{name}.md]"):
        raise SystemExit(f"docs/choose/{name}.md must begin with the note that its neighbours begin with")
    return re.sub(r"\{(\w+)\}", mention, text).strip()


def table(kind: type[CatalogueEntry]) -> list[str]:
    """The fields as a table, or a sentence where there are none."""
    rows = []
    for one in settings(kind):
        default = f"`{cell(one.default, 60)}`" if one.default else "required"
        rows.append(f"| `{one.name}` | {default} | {cell(one.takes)} | {cell(one.meaning)} |")
    return (
        ["| field | default | takes | meaning |", "|---|---|---|---|", *rows, ""] if rows else ["It has no fields.\n"]
    )


def source(word: str, paper: Paper) -> list[str]:
    """A paper, and what is unlike it."""
    rows = [f"{word}: [{paper.title}]({paper.link}), {paper.appeared} (`{paper.key}`).\n"]
    if paper.differs:
        rows += ["Unlike the authors:\n", *(f"- {sentence}" for sentence in paper.differs), ""]
    return rows


def section(name: str, kind: type[CatalogueEntry], verdict: str) -> list[str]:
    """All about one method."""
    module = inspect.getmodule(kind)
    rows = [f"## {name}\n", inspect.cleandoc(kind.__doc__ or "") + "\n"]
    if module and module.__doc__:
        rows.append(f"```text\n{inspect.cleandoc(module.__doc__)}\n```\n")
    rows += [f"Acts at: {sites(kind)}.\n", *table(kind)]
    rows += source("Paper", kind.paper)
    rows.append(f"Claim: [{verdict}](../claims.md).\n" if verdict else "Claim: none measured.\n")
    for paper in kind.paper.also:
        rows += source("Another paper with the formula", paper)
    return rows


def function_page() -> str:
    """The functions, a table with what the ledger found of them, and all about those that follow a paper."""
    told = verdicts()
    rows = ["# Functions\n", "What is no method but done with a model and methods; `heedful show NAME` tells more.\n"]
    rows += ["| call | what it does | paper | claim |", "|---|---|---|---|"]
    following = []
    for name, function in functions().items():
        first, paper = re.split(r"[.:;]\s", function.about.replace("\n", " "))[0].rstrip("."), function.paper
        link = f"[{paper.key}](#{name})" if paper else ""
        claim = f"[{told[name]}](claims.md)" if name in told else ""
        rows.append(f"| `{function.call}` | {cell(first)}. | {link} | {claim} |")
        if paper:
            following += [f"## {name}\n", function.about + "\n", *source("Paper", paper)]
            following.append(f"Claim: [{told.get(name, 'none measured')}](claims.md).\n")
    return "\n".join([*rows, "", *following]).rstrip() + "\n"


def pages() -> dict[str, str]:
    """The index, the pages of the families and that of the functions, by path."""
    told = verdicts()
    out = {"docs/methods.md": index(), "docs/functions.md": function_page()}
    for name, kinds in members().items():
        rows = [f"# {name.capitalize()}\n", FAMILIES[name] + " [All families](../methods.md).\n"]
        rows += ["## How to choose\n", prose(name, kinds) + "\n"]
        for method, kind in kinds.items():
            rows += section(method, kind, told.get(method, ""))
        out[f"docs/methods/{name}.md"] = "\n".join(rows).rstrip() + "\n"
    return out
