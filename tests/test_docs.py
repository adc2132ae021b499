"""The docs: generated parts are up to date, and the README's Python runs."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import heedful
from docs import faults, generate, method_pages
from heedful import models
from heedful.catalogue import entries, entry_from, family
from heedful.core.errors import HeedfulError
from heedful.functions import functions

from . import apart

ROOT = Path(__file__).parents[1]
FAMILIES = sorted({family(kind) for kind in entries().values()})
HOMES = ("", "src/heedful", "src/heedful/methods", "src/heedful/adapters", "src/heedful/conformance")
# examples, and what is written elsewhere
INVENTED = re.compile(r"sharpen|A2601_00001|test_X|^dist/$|heedful\.safetensors")
PAGES = [str(path.relative_to(ROOT)) for path in faults.pages()]
METHOD_PAGES = ["docs/methods.md", *(f"docs/methods/{name}.md" for name in FAMILIES)]


def blocks(name: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))


def run(code: str, tmp_path: Path, **more: str) -> str:
    file = tmp_path / "from_docs.py"
    file.write_text(code)
    here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))} | more
    told = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, check=False, cwd=tmp_path, env=here
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def names(text: str) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def exists(name: str) -> bool:
    """Whether it is there, where it is a path, a name within heedful, or a method with settings; else True."""
    if INVENTED.search(name):
        return True
    if re.fullmatch(r"[\w./]+/[\w.]*|\w+\.py", name):
        made = (ROOT / ".gitignore").read_text().split()  # when it is first needed
        return name.strip("/") in [x.strip("/") for x in made] or any((ROOT / home / name).exists() for home in HOMES)
    try:
        if dotted := re.match(r"heedful(\.\w+)+", name):
            pkgutil.resolve_name(dotted[0])
        if "(" in name and name.partition("(")[0] in entries():
            entry_from(name)
    except (ImportError, AttributeError, HeedfulError):
        return False
    return True


def test_generated_parts_are_up_to_date() -> None:
    """In a process that knows no laws and methods of other tests'."""
    done = apart.script("import runpy, sys; runpy.run_path('docs/generate.py', run_name='__main__')", "--check")
    assert not done.returncode, done.stdout + done.stderr


def test_another_paper_with_the_formula_is_on_the_pages_and_counts() -> None:
    kind = entries()["V2P"]
    (other,) = kind.paper.also
    text = "\n".join(method_pages.section("V2P", kind, "holds"))
    assert f"Another paper with the formula: [{other.title}]({other.link})" in text
    assert all(sentence in text for paper in kind.paper.every for sentence in paper.differs)
    assert f"[{kind.paper.key}]({kind.paper.link}) [{other.key}]({other.link}) |" in method_pages.index()
    keys = {paper.key for kind in entries().values() for paper in kind.paper.every}
    assert {"P018", "P261"} < keys
    assert f"methods, of {len(keys)} papers" in generate.how_many()


def thin(model: models.Loaded, home: Path) -> Path:
    """A model of as many layers and heads, that reads the same tokens, with 5 million weights that know nothing."""
    config = copy.deepcopy(model.model.config)
    config.update({"hidden_size": 72, "intermediate_size": 96, "head_dim": 16})
    AutoModelForCausalLM.from_config(config).save_pretrained(home)
    model.tokenizer.save_pretrained(home)
    return home


@pytest.mark.parametrize("by", ["a thin model", pytest.param("the model itself", marks=pytest.mark.slow)])
def test_the_readme_runs_and_prints_what_it_says(by: str, tmp_path: Path, default_model: models.Loaded) -> None:
    promised = re.findall(r"print\(run.*\)  # ([^\n]*?) \.\.\.", blocks("README.md"))
    assert len(promised) == 2
    more = {models.DEFAULT_VARIABLE: str(thin(default_model, tmp_path / "thin"))} if by == "a thin model" else {}
    told = run(blocks("README.md"), tmp_path, **more)
    assert [words for words in [*promised, "@article"] if words not in told] == []


def test_what_stands_beside_other_libraries_words_runs(tmp_path: Path, default_model: models.Loaded) -> None:
    more = {models.DEFAULT_VARIABLE: str(thin(default_model, tmp_path / "thin"))}
    told = run(blocks("docs/migrating.md"), tmp_path, **more)
    assert "of the largest output" in told
    assert re.search(r"cache entries kept: \d+ of \d+ \(25\.\d%\)", told), told


@pytest.mark.parametrize("page", ["docs/vision.md", "docs/models.md"])
def test_pages_run_as_they_stand(page: str, tmp_path: Path) -> None:
    """timm and open_clip ask for a torchvision that no model needs; something stands in its place here."""
    beside = "from benchmarks.beside_torch import library\nlibrary('timm'), library('open_clip')\n"
    told = run(beside * ("timm" in blocks(page)) + blocks(page), tmp_path)
    assert bool(told) == ("print(" in blocks(page))


def test_most_methods_are_as_short_as_the_readme_says() -> None:
    lengths = sorted(len(Path(inspect.getfile(kind)).read_text().splitlines()) for kind in entries().values())
    most = re.search(r"one file, mostly of fewer than (\d+) lines", (ROOT / "README.md").read_text())
    assert most is not None
    assert lengths[len(lengths) // 2] < int(most[1])


def test_names_in_the_docs_are_there() -> None:
    """Paths lead to files, dotted names into the package, and methods have the settings that they are given."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/choose/*.md")]
    missing = [f"{page.name}: {name}" for page in pages for name in names(page.read_text()) if not exists(name)]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_in_the_docs_imports_from_heedful_what_is_there(page: str) -> None:
    brought = [node for node in ast.walk(ast.parse(blocks(page))) if isinstance(node, ast.ImportFrom)]
    ours = [f"{node.module}:{name.name}" for node in brought if "heedful" in str(node.module) for name in node.names]
    for name in ours:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page != "CONTRIBUTING.md"])
def test_code_in_the_docs_says_where_each_name_is_from(page: str) -> None:
    """By the blocks before it on the page; CONTRIBUTING.md shows parts of files."""
    assert undefined(blocks(page)) == set()


def undefined(code: str) -> set[str]:
    """Names that a script reads and neither makes, imports nor is given by Python."""
    known: set[str] = set(vars(builtins))
    asked: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (asked if isinstance(node.ctx, ast.Load) else known).add(node.id)
        elif isinstance(node, ast.alias):
            known.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
    return asked - known


def test_a_name_from_nowhere_is_found() -> None:
    assert undefined("import a.b\nfor c in a.b: print(c, lambda d: d + e)") == {"e"}


def test_the_method_in_contributing_keeps_every_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sharpen_of_docs.py").write_text(blocks("CONTRIBUTING.md").split('if __name__ == "__main__"')[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    report = heedful.check(importlib.import_module("sharpen_of_docs").Sharpen)
    assert report.ok, str(report)
    assert len(report.verdicts) == len([law for law in heedful.conformance.laws().values() if "method" in law.kinds])


def test_placeholders_and_links_and_names_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("## What `it` is, in short\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# A [link](other.md)\n\n`{Code}` [a](other.md#what-it-is-in-short) [b](#a-link) [c](http://nowhere)\n"
        "`attend.py::tile` `core/method.py::Stack`\n"
    )
    assert faults.faults(page) == []
    page.write_text("{Name} [a](none.md) [b](other.md#that)\n<!-- x -->\n<!-- /x -->\n`kit/attend.py::tile`\n")
    assert [fault.split(",")[0] for fault in faults.faults(page)] == [
        "{Name} was left",
        "<!-- x -->\n<!-- /x --> was left",
        "names kit/attend.py::tile",
        "links to none.md",
        "links to other.md#that",
    ]


def test_verdicts_say_which_claim_they_are_of_where_claims_differ() -> None:
    assert method_pages.together([("P1", "holds")]) == "holds"
    assert method_pages.together([("P1", "holds"), ("P1_more", "holds")]) == "2 claims: holds"
    assert method_pages.together([("P1", "holds"), ("P1_more", "weaker")]) == "P1: holds, P1_more: weaker"
    assert all(len(set(words)) == len(words) for words in (x.split(", ") for x in method_pages.verdicts().values()))


def test_a_function_has_its_verdict_with_a_paper_or_without() -> None:
    rows = {row.split("`")[1]: row for row in method_pages.function_page().splitlines() if row.startswith("| `")}
    told = {f.call: method_pages.verdicts()[name] for name, f in functions().items() if name in method_pages.verdicts()}
    assert any(functions()[name].paper is None for name in functions() if functions()[name].call in told)
    for call, row in rows.items():
        assert row.endswith(f"| [{told[call]}](claims.md) |" if call in told else "|  |")


@pytest.mark.parametrize("page", METHOD_PAGES)
def test_no_cell_of_the_method_pages_is_long(page: str) -> None:
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("|"):
            long = [cell for cell in re.split(r"(?<!\\)\|", line) if len(cell.strip()) > 160]
            assert not long, f"{page}: {long}"


def test_every_method_is_on_exactly_one_family_page() -> None:
    text = {page: (ROOT / page).read_text() for page in METHOD_PAGES[1:]}
    for name, kind in entries().items():
        where = [page for page, said in text.items() for line in said.splitlines() if line == f"## {name}"]
        assert where == [f"docs/methods/{family(kind)}.md"], f"{name} is on {where}"


def test_every_tiny_model_is_on_the_page_of_models() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    assert [name for name in models.kinds() if f"| `tiny:{name}` |" not in text] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tells_how_to_choose(name: str) -> None:
    assert len((ROOT / "docs" / "choose" / f"{name}.md").read_text().split()) > 80
    assert "## How to choose" in (ROOT / "docs" / "methods" / f"{name}.md").read_text()
