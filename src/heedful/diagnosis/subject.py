"""What is diagnosed: a model, and how it is fed with texts, with images or with sounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.grids import Grid, before_patches, grid_of, names_before, regions
from heedful.adapters.transformers import adapt
from heedful.api import attach
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.method import Part, Stack
from heedful.diagnosis.glances import places as shown
from heedful.diagnosis.profile import endless
from heedful.diagnosis.sounds import Sound
from heedful.diagnosis.texts import Delimiters
from heedful.engine.run import Run
from heedful.explaining.aim import reads_pictures, reads_sounds

SMALLER = 16, 4, 1  # rows of a tile, where memory does not hold the ones that are fast


@dataclass(eq=False)
class Subject:
    """A model, how it is fed, and what every run over it is attached with."""

    model: Any  # a PreTrainedModel
    tokenizer: Any
    how: Mapping[str, Any]
    report: Callable[..., None]

    def __post_init__(self) -> None:
        self.layers = len(adapt(self.model, self.how.get("only")).layer_names)
        takes = inspect.signature(self.model.forward).parameters
        self.pictures = reads_pictures(self.model)
        self.sounds = reads_sounds(self.model)
        # spells what is written of sounds; an extractor of features alone spells nothing
        self.words = self.tokenizer if hasattr(self.tokenizer, "decode") else None
        if self.pictures or self.sounds:
            self.tokenizer = None  # what prepares images is none
        elif "input_ids" not in takes:
            raise RefusedModel(
                f"diagnose() reads text, images or sounds, and {type(self.model).__name__} takes neither ids nor "
                "pixels alone"
            )
        self.fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        if "logits_to_keep" in takes:
            self.fixed["logits_to_keep"] = 1  # nobody looks at the logits
        self.device = next(self.model.parameters()).device
        self.both = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self.vocabulary = 0 if self.pictures or self.sounds else int(self.model.get_input_embeddings().weight.shape[0])

    def attach(self, what: Part | Stack) -> Run:
        return attach(self.model, what, **self.how)

    def delimiters(self, batch: int) -> Delimiters | None:
        """Who says where delimiters stand, where words are known and texts are read one by one."""
        return Delimiters(self.tokenizer) if self.tokenizer is not None and batch == 1 else None

    @property
    def reads(self) -> str:
        """What the model is called with."""
        return "image" if self.pictures else "sound" if self.sounds else "text"

    def read(self, run: Run, rows: tuple[Any, ...]) -> None:
        """One forward over images of one size, sounds, or texts of any length, padded to the longest."""
        n = max(map(self.count, rows))
        feed = self._sounds(rows) if self.sounds else self._pixels(rows) if self.pictures else self._tokens(rows, n)
        fewer = [height for height in SMALLER if run.tile_rows is None or height < run.tile_rows]
        while True:
            try:
                with memory(n):
                    run(**feed)
                break
            except TooLittleMemory:
                if not fewer or "tiled" not in run.state.backends.values():
                    raise
            run.tile_rows = fewer.pop(0)  # what the failed forward had counted counts for nothing
        if (layer := run.state.endless) is not None:
            raise endless(f"the heads of layer {layer} ({run.layer_names[layer]}) give")

    def count(self, row: Any) -> int:
        """The tokens of a text or an image; of a sound the encoder's and those that are written."""
        if isinstance(row, Sound):
            return row.places + len(row.written)
        if not self.pictures:
            return len(row)
        rows, cols = self._grid(row)
        return before_patches(self.model) + rows * cols

    def places(self, row: Tensor) -> tuple[list[str], Grid]:
        """What an image's tokens before its patches are, and its rows and columns of places that are shown."""
        grid = self._grid(row)
        return names_before(self.model), shown(regions(self.model, grid, self.count(row))["patches"])[1]

    def _grid(self, row: Tensor) -> Grid:
        grid = grid_of(self.model, {"pixel_values": row[None]})
        if grid is None:
            rule = f"the sides of an image must be multiples of the patches of {type(self.model).__name__}"
            raise FieldError("diagnose()", "texts", tuple(row.shape), rule, (3, 224, 224))
        return grid

    def _pixels(self, rows: tuple[Tensor, ...]) -> dict[str, Any]:
        if len({row.shape for row in rows}) > 1:
            shapes = [tuple(row.shape) for row in rows]
            raise FieldError("diagnose()", "batch", len(rows), f"needs images of one size, and these are {shapes}", 1)
        return {"pixel_values": torch.stack(rows).to(self.device, self.model.dtype), **self.fixed}

    def _sounds(self, rows: tuple[Sound, ...]) -> dict[str, Any]:
        if len(rows) > 1:
            rule = "sounds are read one by one, since of each another number of words is written"
            raise FieldError("diagnose()", "batch", len(rows), rule, 1)
        heard = rows[0].features[None].to(self.device, self.model.dtype)
        return {"input_features": heard, "decoder_input_ids": rows[0].written[None].to(self.device), **self.fixed}

    def _tokens(self, rows: tuple[Tensor, ...], n: int) -> dict[str, Any]:
        ids = torch.stack([nn.functional.pad(row, (0, n - len(row))) for row in rows]).to(self.device)
        feed: dict[str, Any] = {"input_ids": ids, **self.fixed}
        if any(len(row) < n for row in rows):
            lengths = torch.tensor([len(row) for row in rows], device=self.device)
            feed["attention_mask"] = (torch.arange(n, device=self.device) < lengths[:, None]).long()
        if self.both:  # both halves read the text
            feed["decoder_input_ids"] = ids
        return feed


class TooLittleMemory(FieldError):
    """A forward that the machine's memory does not hold."""


@contextmanager
def memory(tokens: int) -> Iterator[None]:
    """Say what to do where the machine has too little memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises plain RuntimeErrors on a CPU
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "t allocate memory" in str(error)
        if not short and "not enough memory" not in str(error):
            raise
        rule = "the machine has too little memory to read that many tokens at once; pass fewer"
        raise TooLittleMemory("diagnose()", "length", tokens, rule, max(2, tokens // 2)) from error
