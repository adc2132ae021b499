"""An interrupt at any line: what a user's Ctrl-C may meet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("heedful.")


def interrupted(at: int, act: Callable[[], Any], where: Callable[[FrameType], bool] = ours) -> bool:
    """Whether `act` was interrupted at its line number `at`, counted over some frames: heedful's."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if not where(frame):
            return None
        if event == "line":
            seen += 1
            if seen == at + 1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
