"""Progress of a long verb on standard error: speed and time left for each stage; notes stand above.

Where that is no terminal, such as a log, there is a line once a minute instead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

    from heedful.core.kinds.conversion import Progress as Step

EVERY = 60.0  # seconds from one line of a log to the next


class Bars:
    """A bar for each stage. `stages` says what a stage does, and what its speed is counted in ("" for no speed)."""

    def __init__(self, stages: Mapping[str, tuple[str, str]]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"))
        self.stages = stages
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,  # else a log gets an empty line
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._told = time.perf_counter()

    def __call__(self, now: Step) -> None:
        if now.note:
            self.console.print(now.note, markup=False, soft_wrap=True)
        clock = time.perf_counter()
        what, unit = self.stages[now.stage]
        if now.stage not in self._tasks:
            self._tasks[now.stage] = self.progress.add_task(what, total=now.total, speed="")
            self._began[now.stage] = clock, now.done
        began, first = self._began[now.stage]
        made = now.done - first
        rate = made / max(clock - began, 1e-9)
        speed = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"
        speed = speed if made and unit else ""
        self.progress.update(self._tasks[now.stage], total=now.total, completed=now.done, speed=speed)
        if not self.console.is_terminal and clock - self._told >= EVERY:
            self._told = clock
            of = f"{what}: {now.done:,} of {now.total:,}"
            self.console.print(f"{of}, {speed}" if speed else of, markup=False)
