"""What a model reads, texts, images or sounds, and all that this means for a diagnosis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.adapters.grids import Grid, before_patches, grid_of, names_before, regions
from heedful.api import still
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import Measure
from heedful.diagnosis import glances, listening, view
from heedful.diagnosis.images import images
from heedful.diagnosis.measures import DEFAULT, HEARD, PICTURED
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.sounds import Sound, sounds, writes
from heedful.diagnosis.store import View
from heedful.diagnosis.texts import Texts, Windows, cut, some, sources
from heedful.explaining.aim import batch_of
from heedful.shown import Reads

if TYPE_CHECKING:
    from heedful.diagnosis.subject import Subject


class Input(ABC):
    """One kind of what models read; rows are texts, images or sounds of which each is read whole."""

    stage: ClassVar[str]  # what reading it is called
    measures: ClassVar[tuple[Measure, ...]]  # those that are taken where none are named

    @abstractmethod
    def windows(self, subject: Subject, given: Texts, reader: Any, length: int) -> Windows:
        """The rows of what a user gives; `reader` is the tokenizer or processor that came with the model."""

    @abstractmethod
    def count(self, subject: Subject, row: Any) -> int:
        """The tokens of a row."""

    @abstractmethod
    def feed(self, subject: Subject, rows: tuple[Any, ...]) -> dict[str, Any]:
        """What the model is called with to read rows at once."""

    @abstractmethod
    def view(self, subject: Subject, windows: Windows, profile: Profile, looks: view.LooksByLayer) -> View | None:
        """Where the most notable heads look; `looks` has what was seen in the first window while it was read."""


class TextInput(Input):
    """Texts of any length, padded to the longest."""

    stage = "text"
    measures = DEFAULT

    def windows(self, subject: Subject, given: Texts, reader: Any, length: int) -> Windows:
        return some(cut(sources(given), subject.tokenizer, length, subject.vocabulary))

    def count(self, subject: Subject, row: Any) -> int:
        return len(row)

    def feed(self, subject: Subject, rows: tuple[Tensor, ...]) -> dict[str, Any]:
        return batch_of(subject.model, rows)

    def view(self, subject: Subject, windows: Windows, profile: Profile, looks: view.LooksByLayer) -> View | None:
        return view.look(subject, windows, profile, looks)


class ImageInput(Input):
    """Images, those of one size at once."""

    stage = "images"
    measures = PICTURED

    def windows(self, subject: Subject, given: Texts, reader: Any, length: int) -> Windows:
        return images(given, reader)

    def count(self, subject: Subject, row: Tensor) -> int:
        rows, cols = _grid(subject.model, row)
        return before_patches(subject.model) + rows * cols

    def feed(self, subject: Subject, rows: tuple[Tensor, ...]) -> dict[str, Any]:
        if len({row.shape for row in rows}) > 1:
            shapes = [tuple(row.shape) for row in rows]
            raise FieldError("diagnose()", "batch", len(rows), f"needs images of one size, and these are {shapes}", 1)
        return {"pixel_values": torch.stack(rows).to(subject.device, subject.model.dtype)}

    def view(self, subject: Subject, windows: Windows, profile: Profile, looks: view.LooksByLayer) -> View | None:
        first = windows.tokens[0]
        patches = regions(subject.model, _grid(subject.model, first), self.count(subject, first))["patches"]
        return glances.look(subject, windows, profile, names_before(subject.model), glances.places(patches)[1])


class SoundInput(Input):
    """Sounds, one by one, since of each another number of words is written."""

    stage = "sounds"
    measures = HEARD

    def windows(self, subject: Subject, given: Texts, reader: Any, length: int) -> Windows:
        with still(subject.model):
            return sounds(given, reader, writes(subject.model))

    def count(self, subject: Subject, row: Sound) -> int:
        return row.places + len(row.written)  # the encoder's, and those that are written

    def feed(self, subject: Subject, rows: tuple[Sound, ...]) -> dict[str, Any]:
        if len(rows) > 1:
            rule = "sounds are read one by one, since of each another number of words is written"
            raise FieldError("diagnose()", "batch", len(rows), rule, 1)
        heard = rows[0].features[None].to(subject.device, subject.model.dtype)
        return {"input_features": heard, "decoder_input_ids": rows[0].written[None].to(subject.device)}

    def view(self, subject: Subject, windows: Windows, profile: Profile, looks: view.LooksByLayer) -> View | None:
        return listening.look(subject, windows)


INPUTS: Mapping[Reads, Input] = {"text": TextInput(), "image": ImageInput(), "sound": SoundInput()}


def _grid(model: nn.Module, row: Tensor) -> Grid:
    grid = grid_of(model, {"pixel_values": row[None]})
    if grid is None:
        rule = f"the sides of an image must be multiples of the patches of {type(model).__name__}"
        raise FieldError("diagnose()", "texts", tuple(row.shape), rule, (3, 224, 224))
    return grid
