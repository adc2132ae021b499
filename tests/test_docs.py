"""The docs: generated parts are up to date, and the README's Python runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heedful.catalogue import entries, family

ROOT = Path(__file__).parents[1]
FAMILIES = sorted({family(kind) for kind in entries().values()})
METHOD_PAGES = ["docs/methods.md", *(f"docs/methods/{name}.md" for name in FAMILIES)]


def blocks(name: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))


def run(code: str, tmp_path: Path) -> str:
    file = tmp_path / "from_docs.py"
    file.write_text(code)
    here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    told = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, check=False, cwd=tmp_path, env=here
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_generated_parts_are_up_to_date() -> None:
    told = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert told.returncode == 0, told.stderr


def test_the_readme_runs(tmp_path: Path) -> None:
    told = run(blocks("README.md"), tmp_path)
    assert "first-token sink rate" in told
    assert "active: 30 of 30 layers entered, computed by tiled" in told
    assert "@article" in told


def test_the_method_in_contributing_keeps_every_law(tmp_path: Path) -> None:
    told = run(
        blocks("CONTRIBUTING.md").split('if __name__ == "__main__"')[0]
        + "import heedful\nprint(heedful.check(Sharpen))\n",
        tmp_path,
    )
    assert "0 broken" in told


@pytest.mark.parametrize("page", [*sorted(p.name for p in ROOT.glob("*.md")), "docs/claims.md", *METHOD_PAGES])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}, which is not there"


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


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tells_how_to_choose(name: str) -> None:
    assert len((ROOT / "docs" / "choose" / f"{name}.md").read_text().split()) > 80
    assert "## How to choose" in (ROOT / "docs" / "methods" / f"{name}.md").read_text()
