"""Images as a user has them, as pixels: files, folders of files, or what is pixels already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from heedful.core.errors import Code, FieldError, HeedfulError, first_line
from heedful.diagnosis.gathering import Gathering
from heedful.diagnosis.texts import Source, Texts, Windows

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
MOST = 4 << 30  # bytes of pixels that are held without a word


def images(given: Texts, reader: Any) -> Windows:
    """Each image a window of its own; files as the model's own `reader` prepares them.

    A file of a folder that cannot be read is left out, and told; one that is named is an error.
    """
    rows: list[Tensor] = []
    names: list[str] = []
    skipped: list[str] = []
    size = 0
    for source, pixels in IMAGES.each(given, reader):
        if source.unread:
            skipped.append(f"{source.name} {source.unread}")
            continue
        for one in pixels:
            size += one.numel() * one.element_size()
            if size > MOST:
                rule = f"take over {MOST >> 30} GB as pixels, which are held at once: read parts, and add profiles up"
                raise IMAGES.refuse(
                    f"more than {len(rows)} images", rule, "diagnose(model, some) + diagnose(model, others)"
                )
            rows.append(one)
            names.append(source.name)
    if not rows:
        raise IMAGES.nothing(given, skipped)
    of = tuple(range(len(rows)))
    return Windows(tuple(rows), Source(names[0]), len(rows), 0, tuple(skipped), of, tuple(names))


def processor_of(reader: Any, owner: str = "diagnose()") -> ImageProcessingMixin:
    """What prepares images for the model, alone or in a processor of images and text."""
    found = getattr(reader, "image_processor", reader)
    if not isinstance(found, ImageProcessingMixin):
        rule = (
            "reading image files needs the model's image processor, and the model came without one: save it beside the "
            "model with processor.save_pretrained(folder), or pass it"
        )
        raise FieldError(owner, "tokenizer", reader, rule, Code("AutoImageProcessor.from_pretrained(...)"))
    return found


def opened(path: Path) -> tuple[Any, str]:
    """A file's picture, upright and in colours, and why there is none."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise HeedfulError("reading image files needs one more package: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), ""
    except UnidentifiedImageError:
        return None, "is no image that can be read"
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # as PIL has them
        return None, f"cannot be read ({first_line(error)})"


def pixels_of(path: Path, processor: Any) -> tuple[list[Tensor], str]:
    """A file's pixels as the model takes them, and why there are none."""
    upright, why = opened(path)
    if why:
        return [], why
    try:
        pixels = torch.as_tensor(processor(images=upright, return_tensors="pt")["pixel_values"])
    except (OSError, ValueError) as error:
        return [], f"cannot be read ({first_line(error)})"
    if pixels.ndim != 4 or len(pixels) != 1:
        return [], f"becomes {tuple(pixels.shape)} in this model's processor, which is not one image"
    return [pixels[0]], ""


def _pixels(given: Tensor) -> Sequence[Tensor] | None:
    if given.ndim not in (3, 4) or not given.is_floating_point():
        return None
    return list(given) if given.ndim == 4 else [given]


IMAGES = Gathering(
    "image", ENDINGS, "pictures",
    "a model that reads images takes their pixels, [c rows cols], a batch [b c rows cols], files or folders of them, "
    "as Path, or a list of these",
    "processor(image, return_tensors='pt').pixel_values, or Path('pictures')",
    lambda reader: partial(pixels_of, processor=processor_of(reader)), _pixels,
)  # fmt: skip
