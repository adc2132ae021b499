"""What is wrong with a page whoever wrote it: placeholders that were left, and links and names that lead nowhere."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
PLACEHOLDER = re.compile(r"\{[A-Za-z]\w*\}|<!-- (\w+) -->\s*<!-- /\1 -->|\b(?:TODO|FIXME|XXX)\b")


def pages() -> list[Path]:
    """Every page that is read: what stands in `docs/choose` is read as part of another."""
    return sorted(ROOT / name for pattern in ("*.md", "docs/*.md", "docs/methods/*.md") for name in ROOT.glob(pattern))


def everywhere() -> list[str]:
    """What is wrong with any of them."""
    return [f"{page.relative_to(ROOT)}: {fault}" for page in pages() for fault in faults(page)]


def faults(page: Path) -> list[str]:
    """What is wrong with one page."""
    whole = page.read_text()
    text = CODE.sub("", whole)
    found = [f"{left[0]} was left" for left in PLACEHOLDER.finditer(text)]
    named = (each for each in NAMED.findall(whole) if not _defined(*each))
    found += [f"names {file}::{name}, which is not there" for file, name in named]
    for target, section in LINK.findall(text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        there = page.parent / target if target else page
        if not there.exists():
            found.append(f"links to {target}, which is not there")
        elif section and there.suffix == ".md" and section not in anchors(there):
            found.append(f"links to {target}#{section}, and no heading is that")
    return found


def _defined(file: str, name: str) -> bool:
    """Whether a file of the package, known by the end of its path, has a function or class of that name."""
    homes = (path for path in (ROOT / "src").rglob(Path(file).name) if f"/{path.as_posix()}".endswith(f"/{file}"))
    return any(re.search(rf"^ *(?:def|class) {name}\b", path.read_text(), re.MULTILINE) for path in homes)


@cache
def anchors(page: Path) -> frozenset[str]:
    """What a link can name within a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain)
