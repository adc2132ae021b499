"""The docs: generated parts are up to date, and the README's Python runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("page", [*sorted(p.name for p in ROOT.glob("*.md")), "docs/claims.md", "docs/methods.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}, which is not there"
