"""Processes of their own that need not import everything anew.

Each is forked from a server that was started fresh, has imported the libraries, and has done nothing with them. What
is about the start of Python itself, its options or its variables, starts Python.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

APART = multiprocessing.get_context("forkserver")
APART.set_forkserver_preload(
    ["heedful.api", "heedful.conformance", "heedful.diagnosis.run", "transformers.models.llama.modeling_llama"]
)
HOME = Path(__file__).parents[1]
SECONDS = 200


def script(code: str, *words: str, cwd: Path = HOME) -> CompletedProcess[str]:
    """What a script says and how it ends, as by `python -W error -c CODE WORDS`."""
    return said(_script, code, words, str(cwd))


def said(act: Callable[..., Any], *given: Any) -> CompletedProcess[str]:
    """What a function writes to both streams in a process of its own, and how that ends."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = APART.Process(target=_heard, args=(str(out), str(err), act, given))
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        assert process.exitcode is not None
        return CompletedProcess([], process.exitcode, out.read_text(), err.read_text())


def _heard(out: str, err: str, act: Callable[..., Any], given: tuple[Any, ...]) -> None:
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.exit(act(*given))


def _script(code: str, words: tuple[str, ...], cwd: str) -> None:
    os.chdir(cwd)
    sys.argv = ["-c", *words]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
