"""One self-contained HTML file that shows a profile: from disk, without network, on any screen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from heedful.catalogue import entries, family
from heedful.core.figures import Description, counted
from heedful.core.files import replace_text
from heedful.core.kinds.weights import Measure
from heedful.core.method import Method, method_of
from heedful.report import data
from heedful.report.colours import ACCENT, template
from heedful.report.glances import packed
from heedful.report.plots import MissingPackage
from heedful.report.sparks import spark

MENTION = re.compile(r"\b[Hh]eads? {0}(?:(?:, and |, | and ){0})*".format(r"\d+\.\d+(?: \([^)]*\))?"))
WORDS = {  # what the page calls things
    "over": "What its attention does",
    "nothing": "No measure found anything worth a sentence. The maps below hold the numbers.",
    "points": "Compared",
    "curves": "Along layers, positions and distances",
    "tables": "The most telling rows",
    "used": "What was measured, and by whose method",
}
SHOWN = 4  # curves and grids that are not folded
SECONDS = {
    "preparing": "preparing what is read",
    "text": "reading the text",
    "images": "reading the images",
    "sounds": "reading the sounds",
    "trials": "synthetic probes",
    "view": "the view",
}


@cache
def _engine() -> str:
    """Plotly's script from its own wheel, compressed: 4.8 MB become 2."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackage("plotly") from error
    return data.zipped(get_plotlyjs().encode())


def environment() -> Any:
    """What fills templates in."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingPackage("jinja2") from error
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["heads"] = _heads
    made.filters["code"] = _code
    made.filters["spelled"] = _spelled
    return made


def asset(name: str) -> str:
    return (resources.files("heedful.report") / name).read_text(encoding="utf-8")


def embed(value: object) -> str:
    """JSON that may stand in a script element: nothing in a text can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _heads(text: str) -> Any:
    """A sentence whose heads, as in "heads 14.3 and 17.1", can be picked."""
    from markupsafe import Markup, escape

    def button(name: re.Match[str]) -> str:
        return f'<button type="button" class="head" data-head="{name[0]}">{name[0]}</button>'

    return Markup(
        MENTION.sub(lambda found: re.sub(r"(?<![\d.(])\d+\.\d+(?!\d*%)", button, found[0]), str(escape(text)))
    )


def _code(text: str) -> Any:
    """A sentence whose words in backticks are code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _spelled(name: str) -> Any:
    """A method as it is written, which may be broken behind brackets, commas and bars and within CamelCase only."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[(,|])|(?<=[a-z])(?=[A-Z])", name))


def entry(name: str) -> dict[str, Any]:
    kind = entries().get(name)
    if kind is None:
        return {"name": name}
    doc = (kind.__doc__ or "").strip().splitlines()
    reads = issubclass(kind, Method) and all(edit.reads for edit in kind.edits)
    told = {"name": name, "doc": doc[0] if doc else "", "paper": kind.paper, "family": family(kind)}
    return told | {"comparable": issubclass(kind, Method) and not reads}


def _measures(told: Iterable[tuple[Measure, Description]]) -> list[dict[str, Any]]:
    found = {}
    for part, _ in told:
        method = method_of(part)
        doc = (type(method).__doc__ or "").strip().splitlines()
        found[repr(part)] = {"name": repr(part), "doc": doc[0] if doc else "", "paper": method.paper}
    return list(found.values())


def _short(number: float) -> str:
    for size, letter in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def _facts(facts: Any) -> list[tuple[str, str]]:
    """The line below the model's name."""
    out = []
    if "kind" in facts:
        out.append(("model", str(facts["kind"])))
    if "layers" in facts and "heads" in facts:
        keys = facts.get("kv_heads") or facts["heads"]
        shared = {1: ", multi-query: one key head", facts["heads"]: ""}
        size = f"{counted(facts['layers'], 'layer')} × {counted(facts['heads'], 'head')}"
        out.append(("attention", size + shared.get(keys, f", grouped-query: {counted(keys, 'key head')}")))
    if "parameters" in facts:
        out.append(("parameters", _short(facts["parameters"])))
    if "tokens" in facts:
        texts = facts.get("texts")
        of = f" in {counted(texts, facts.get('reads', 'text'))}" if isinstance(texts, int) else ""
        out.append(("read", f"{_short(facts['tokens'])} token{'s' * (facts['tokens'] != 1)}{of}"))
    seconds = facts.get("seconds") or {}
    if seconds:
        out.append(("time", f"{sum(seconds.values()):.3g} s"))
    if "date" in facts:
        out.append(("on", str(facts["date"])[:10]))
    return out


def more(facts: Any) -> list[tuple[str, str]]:
    """Every fact, for the foot of the page."""
    rows = []
    for name, value in facts.items():
        if name == "seconds" and isinstance(value, dict):
            rows += [(f"seconds for {SECONDS.get(k, k)}", f"{v:.3g}") for k, v in value.items()]
        elif isinstance(value, dict):
            if value and not any(isinstance(v, (dict, list, tuple)) for v in value.values()):
                rows.append((name, ", ".join(f"{k} {v}" for k, v in value.items())))
        elif isinstance(value, (list, tuple)):
            if value:
                rows.append((name, ", ".join(map(str, value))))
        elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            rows.append((name.replace("_", " "), f"{value:,}"))
        elif value not in (None, ""):
            rows.append((name.replace("_", " "), str(value)))
    return rows


def by_kind(figures: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The template's sections."""
    return {kind: [f for f in figures if f["kind"] == kind] for kind in data.KINDS.values()}


def along(kinds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The curves and grids that are shown, those that are folded away, and what shades mean where it is the same."""
    figures = kinds["curves"] + kinds["grid"]
    shown = [f for f in figures if not f["folded"]][:SHOWN]
    shades = [f["shaded"] for f in figures if "shaded" in f]
    same = shades[0] if len(shades) > 1 and len(set(shades)) == 1 else ""
    return {"shown": shown, "folded": [f for f in figures if f not in shown], "shaded": same}


def _certainty(facts: Any) -> str:
    """What is known of how much texts differ."""
    if facts.get("windows") != 1:
        return ""
    if (kind := facts.get("reads")) is not None:
        return f"One {kind} was read, so that nothing here tells how much {kind}s differ; pass several to see it."
    return "One stretch of text was read, so that nothing here tells how much texts differ; pass several to see it."


def _content(profile: data.Shown) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What the template writes, what the script reads, and the packed token view."""
    told: Sequence[tuple[Measure, Description]] = profile.description()
    figures = [data.figure(f, type(method_of(part)).__name__) for part, t in told for f in t.figures]
    findings = profile.findings()
    heard = [data.figure(f, "the view") for f in profile.view.figures()] if hasattr(profile.view, "figures") else []
    figures += heard
    roles = data.roles(told)
    sparks = {f.key: line for _, t in told for f in t.figures if (line := spark(f)) is not None}
    about, numbers = ({}, "") if profile.view is None or heard else _view(profile.view)
    read = {
        "figures": [f for f in figures if f["kind"] != "lit"],  # the template has written those
        "roles": roles,
        "view": about or None,
        "group": data.sharing(profile.facts),
    }
    acting = list(dict.fromkeys(name for f in findings for name in f.methods))
    written = {
        "words": WORDS,
        "model": str(profile.facts.get("model", "a model")),
        "facts": _facts(profile.facts),
        "more": more(profile.facts),
        "findings": findings,
        "sparks": sparks,
        "roles": roles,
        "matrix": None,
        "role_map": data.role_map(roles, profile.facts),
        "acting": [entry(name) for name in acting],
        "measures": _measures(told),
        "kinds": by_kind([f for f in figures if f not in heard or f["kind"] == "heads"]),
        "sounds": by_kind(heard),
        "along": along(by_kind([f for f in figures if f not in heard])),
        "certainty": _certainty(profile.facts),
        "view": about,
        "glances": "images" in about,
    }
    return written, read, numbers


def _view(view: Any) -> tuple[dict[str, Any], str]:
    return data.packed(view) if hasattr(view, "tokens") else packed(view)


def render(profile: data.Shown) -> str:
    """A profile's page as text."""
    environment()  # what is missing is better known before figures are drawn
    return html(*_content(profile))


def html(written: dict[str, Any], read: dict[str, Any], numbers: str = "") -> str:
    """A page from what the template writes, what the script reads, and the packed token view."""
    engine = _engine()
    read = {
        "roles": [],
        "view": None,
        "group": 1,
        "theme": {"light": template(False), "dark": template(True)},
        "accent": {"light": ACCENT[False], "dark": ACCENT[True]},
        **read,
    }
    return (
        environment()
        .from_string(asset("template.html"))
        .render(
            **written,
            style=asset("page.css"),
            scripts=[asset("page.js"), asset("glances.js" if written["glances"] else "tokens.js")],
            data=embed(read),
            numbers=numbers,
            engine=engine,
        )
    )


def write(profile: data.Shown, path: str | Path) -> Path:
    """Write a profile's page."""
    return put(render(profile), path)


def put(text: str, path: str | Path) -> Path:
    """Write a page beside its place, then put it there, so that no half-written page is left."""
    path = Path(path)
    replace_text(path, text)
    return path
