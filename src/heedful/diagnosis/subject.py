"""What is diagnosed: a model, and how it is fed with texts, with images or with sounds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heedful.adapters.choosing import adapter_for
from heedful.adapters.wrapped import device_of
from heedful.api import attach
from heedful.core.errors import RefusedModel, TooLittleMemory
from heedful.core.kinds.conversion import Report
from heedful.core.method import Part, Stack
from heedful.diagnosis.inputs import INPUTS
from heedful.diagnosis.profile import endless
from heedful.diagnosis.texts import Delimiters
from heedful.engine.memory import enough_memory
from heedful.engine.run import Run
from heedful.explaining.aim import read_by

SMALLER = 16, 4, 1  # rows of a tile, where memory does not hold the ones that are fast


@dataclass(eq=False)
class Subject:
    """A model, how it is fed, and what every run over it is attached with."""

    model: Any  # a PreTrainedModel
    tokenizer: Any
    how: Mapping[str, Any]
    report: Report

    def __post_init__(self) -> None:
        self.layers = len(adapter_for(self.model, self.how.get("only")).layer_names)
        self.reads = read_by(self.model)
        self.input = INPUTS[self.reads]
        # spells what is written of sounds; an extractor of features alone spells nothing
        self.words = self.tokenizer if hasattr(self.tokenizer, "decode") else None
        takes = inspect.signature(self.model.forward).parameters
        if self.reads != "text":
            self.tokenizer = None  # what prepares images is none
        elif "input_ids" not in takes:
            raise RefusedModel(
                f"diagnose() reads text, images or sounds, and {type(self.model).__name__} takes neither ids nor "
                "pixels alone"
            )
        self.fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        if "logits_to_keep" in takes:
            self.fixed["logits_to_keep"] = 1  # nobody looks at the logits
        self.device = device_of(self.model)
        self.vocabulary = int(self.model.get_input_embeddings().weight.shape[0]) if self.reads == "text" else 0

    def attach(self, what: Part | Stack) -> Run:
        return attach(self.model, what, **self.how)

    def delimiters(self, batch: int) -> Delimiters | None:
        """Who says where delimiters stand, where words are known and texts are read one by one."""
        return Delimiters(self.tokenizer) if self.tokenizer is not None and batch == 1 else None

    def count(self, row: Any) -> int:
        """The tokens of a row: of a sound the encoder's and those that are written."""
        return self.input.count(self, row)

    def read(self, run: Run, rows: tuple[Any, ...]) -> None:
        """One forward over rows, in smaller tiles where memory does not hold those that are fast."""
        feed, tokens = self.input.feed(self, rows), max(map(self.count, rows))
        fewer = [height for height in SMALLER if run.tile_rows is None or height < run.tile_rows]
        while True:
            try:
                with enough_memory("diagnose()", "length", tokens, "that many tokens", max(2, tokens // 2)):
                    run(**feed, **self.fixed)
                break
            except TooLittleMemory:
                if not fewer or "tiled" not in run.state.backends.values():
                    raise
            run.tile_rows = fewer.pop(0)  # what the failed forward had counted counts for nothing
        if (layer := run.state.endless) is not None:
            raise endless(f"the heads of layer {layer} ({run.layer_names[layer]}) give")

    def shown(self, reader: Part, row: Any) -> Any:
        """What a reader finds in one row, read alone; nothing where no layer shows it."""
        with self.attach(reader) as run:
            self.read(run, (row,))
            return run[reader] if run.state.statistics else {}
