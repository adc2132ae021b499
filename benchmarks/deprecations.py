"""A plugin of pytest: what the libraries below say that they will break, as lines of JSON; no such warning is an error.

    DEPRECATIONS=file python -m pytest -p benchmarks.deprecations ...

transformers says most of it through its log, which becomes a warning here, so that one way leads to the file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
TELLS = re.compile(r"deprecat|will be (removed|changed|dropped)|no longer be", re.IGNORECASE)
WHEN = re.compile(r"\b(?:in|from|until|with|of|since)\s+(?:\w+\s+)?(?:version|release)?\s*v?(\d+(?:\.\d+)+|[vV]\d+)")


@dataclass(frozen=True, order=True)
class Notice:
    """One thing that will break: who says so, what, and in which of its versions."""

    package: str
    text: str
    when: str

    @classmethod
    def read(cls, text: str, filename: str) -> Notice:
        """A message of a warning; numbers that differ from run to run would make one notice many."""
        inside = Path(filename).parts
        package = inside[inside.index("site-packages") + 1] if "site-packages" in inside else "heedful's tests"
        line = re.sub(r"0x[0-9a-f]+|\b\d{5,}\b", "...", " ".join(text.split())).replace("`", "'")
        told = WHEN.search(line)
        return cls(package.removesuffix(".py"), line, told[1] if told else "not said")


class Relay(logging.Handler):
    """Hands on what a library's log says of things deprecated, as a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if TELLS.search(text):
            warnings.warn_explicit(text, FutureWarning, record.pathname, record.lineno)


def pytest_configure() -> None:
    logging.getLogger("transformers").addHandler(Relay())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _record()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _record()


def _record() -> None:
    """Goes before the filters of the suite, the marks of single tests among them."""
    for kind in KINDS:
        warnings.filterwarnings("always", category=kind)


def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    file = os.environ.get("DEPRECATIONS")
    if file and "PYTEST_XDIST_WORKER" not in os.environ and issubclass(warning_message.category, KINDS):
        notice = Notice.read(str(warning_message.message), warning_message.filename)
        with Path(file).open("a") as lines:
            lines.write(json.dumps(asdict(notice)) + "\n")


def told(file: Path) -> list[dict[str, str]]:
    """What a run wrote, each once."""
    found: Iterable[str] = file.read_text().splitlines() if file.exists() else ()
    return [asdict(notice) for notice in sorted({Notice(**json.loads(line)) for line in found})]
