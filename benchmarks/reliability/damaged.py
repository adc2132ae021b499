"""Files of every kind with something changed in them."""

from __future__ import annotations

import inspect
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


def damaged(count: int) -> dict[str, Any]:
    """Files of every kind with something changed in them."""
    from tests import test_damaged as damage

    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        files = inspect.unwrap(damage.files)(_Folders(Path(home)))  # the function that the fixture is made of
        for name in damage.PLANS:
            place = Path(home) / name
            place.mkdir()
            found += damage.outcomes(name, files, place, count // len(damage.PLANS))
            print(name, dict(found), flush=True)
    other = sum(n for word, n in found.items() if word not in ("read", "refused"))
    return {"files": sum(found.values()), "refused": found["refused"], "read": found["read"], "anything else": other}


class _Folders:
    """What pytest calls a factory of folders."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def mktemp(self, name: str) -> Path:
        (self.home / name).mkdir()
        return self.home / name
