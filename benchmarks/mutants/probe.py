"""A trial of one change: a forked child runs the tests with the changed file in the place of the real one."""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import io
import math
import os
import resource
import signal
import sys
import time
from ast import Module
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ASLEEP = 20  # times its limit of computing that a child may take by the clock: the machine may be busy
PASSED, FAILED, NO_RUN = 0, (1, 2), 70  # pytest's status: 2 is a file that could not even be imported


@dataclass
class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree."""

    module: str
    path: Path
    tree: Module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=str(self.path))
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def warm() -> None:
    """What every child needs, imported once; no method and no explaining verb may be among it."""
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from heedful import Method, attach, models
    from heedful.core.paper import Paper
    from heedful.core.sites import Site, at

    torch.set_num_threads(1)  # a forked child has no other threads

    class Double(Method):
        paper = Paper("none", "Double", "heedful", 2026)

        @at(Site.QUERY)
        def double(self, query: torch.Tensor, call: object) -> torch.Tensor:
            return query * 2

    model = models.tiny("llama")
    with torch.no_grad(), attach(model, Double()) as run:
        run(**models.tiny_inputs(model))  # the first run imports more
    gc.collect()
    gc.freeze()  # children need not look through all this again
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they warn that they are imported already


def survives(module: str, path: Path, tests: list[Path], tree: Module | None, limit: float) -> bool:
    """Whether tests and laws hold; a child that computes for more than `limit` seconds hangs, and so is caught."""
    if module in sys.modules:
        raise RuntimeError(f"{module} is imported already: the change would not be seen")
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit)))
        os._exit(_run(module, path, tests, tree))
    status = _wait(child, ASLEEP * limit)
    if status == PASSED:
        return True
    if status is None or status < 0 or status in FAILED:
        return False
    raise RuntimeError(f"pytest did not run {tests[0]}: status {status}")


def _run(module: str, path: Path, tests: list[Path], tree: Module | None) -> int:
    import pytest

    if tree is not None:
        sys.meta_path.insert(0, _Changed(module, path, tree))
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            status = int(pytest.main([*map(str, tests), "-x", "-q", "-p", "no:cacheprovider"]))
            return FAILED[0] if status == PASSED and not _lawful(module) else status
    except BaseException:  # noqa: BLE001  the child ends here whatever happens
        return NO_RUN


def _lawful(module: str) -> bool:
    """Whether the methods of a module keep the laws, but for the two that ask the whole catalogue and the ledger.

    What has no paper serves other methods, and has no laws of its own.
    """
    from heedful import check
    from heedful.conformance import laws
    from heedful.core.entry import CatalogueEntry
    from heedful.core.paper import UNPUBLISHED

    asked = tuple(name for name in laws() if name not in ("composes", "is_documented"))
    found = vars(sys.modules[module]).values()
    kinds = [x for x in found if isinstance(x, type) and issubclass(x, CatalogueEntry) and x.__module__ == module]
    return all(check(kind, asked).ok for kind in kinds if kind.paper is not UNPUBLISHED and kind.__name__[0] != "_")


def _wait(child: int, limit: float) -> int | None:
    """The child's status, negative by a signal; None when its time ran out."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
