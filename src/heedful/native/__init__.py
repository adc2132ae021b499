"""heedful's own attention for the CPU, through ctypes: a plain shared library, built where a compiler is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from heedful.core.errors import BackendError

PATH_VARIABLE = "HEEDFUL_NATIVE"  # demands one of a library's paths, or "off"
FILE_VARIABLE = "HEEDFUL_NATIVE_FILE"  # another build of the kernel, as for looking for memory faults

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Problem(ctypes.Structure):
    """problem.h, field by field."""

    _fields_: ClassVar[Any] = [
        *((name, _I) for name in ("batch", "heads", "kv_heads", "queries", "keys", "width", "value_width")),
        *((name, _P) for name in ("q", "k", "v", "out")),
        *((name, _I * 3) for name in ("q_stride", "k_stride", "v_stride")),
        ("held", _P),
        ("bfloat16", _I),
        ("out_bfloat16", _I),
        ("exact", _I),
        ("scale", _F),
        ("softcap", _F),
        ("form", _I),
        ("mean", _I),
        ("shift", _F),
        ("bias", _P),
        ("bias_stride", _I * 3),
        ("sink", _P),
        ("ranges", _P),
        ("range_count", _I),
        ("range_stride", _I * 2),
        ("picked", _P),
        ("picked_stride", _I * 2),
        ("table", _P),
        ("table_stride", _I * 3),
        ("blocks", _P),
        *((name, _I) for name in ("block", "block_cols", "block_units")),
        ("block_stride", _I * 2),
        ("live", _P),
        ("live_stride", _I),
        ("first_at", _P),
        ("carry", _P),
        ("carry_width", _I),
        *((name, _P) for name in ("received", "entropy", "peak", "first", "distance", "place", "carried")),
        *((name, _I) for name in ("nearest", "reach", "q_first", "threads")),
        ("rows", _P),
        ("given", _P),
        ("given_stride", _I * 3),
        ("columns", _P),
        *((name, _P) for name in ("to_q", "to_k", "to_v", "to_bias")),
        ("diagonal", _I),
    ]


@dataclass(frozen=True)
class Library:
    """The kernel, on the instruction set that it runs with."""

    handle: ctypes.CDLL
    path: str
    paths: tuple[str, ...]  # all that this machine can run, best first

    def attend(self, problem: Problem) -> None:
        self._do(self.handle.heedful_attend, problem)

    def pull(self, problem: Problem) -> None:
        """The way back of what was attended."""
        self._do(self.handle.heedful_pull, problem)

    def _do(self, what: Callable[[object, bytes], int], problem: Problem) -> None:
        if what(ctypes.byref(problem), self.path.encode()):
            raise BackendError(f"the native kernel has no path {self.path!r}; there are {', '.join(self.paths)}")


@cache
def library() -> Library | str:
    """The kernel, or why there is none."""
    requested = os.environ.get(PATH_VARIABLE, "")
    if requested == "off":
        return f"the native kernel is switched off by {PATH_VARIABLE}=off"
    file = Path(os.environ.get(FILE_VARIABLE) or Path(__file__).with_name("kernel.so"))
    if not file.is_file():
        return "the native kernel was not built: heedful was installed without a C++ compiler; get g++ and reinstall"
    try:
        handle = ctypes.CDLL(str(file))
    except OSError as error:
        return f"the native kernel cannot be loaded: {error}"
    handle.heedful_problem_bytes.restype = ctypes.c_int64
    if handle.heedful_problem_bytes() != ctypes.sizeof(Problem):
        return f"the native kernel in {file.name} is of another version of heedful; reinstall heedful"
    handle.heedful_paths.restype = ctypes.POINTER(ctypes.c_char_p)
    for way in (handle.heedful_attend, handle.heedful_pull):
        way.argtypes = [ctypes.POINTER(Problem), ctypes.c_char_p]
    paths = []
    for name in handle.heedful_paths():
        if name is None:
            break
        paths.append(name.decode())
    if requested and requested not in paths:
        return f"{PATH_VARIABLE}={requested}: this machine has {', '.join(paths)}"
    return Library(handle, requested or paths[0], tuple(paths))
