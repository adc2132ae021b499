"""Images as a user has them, as pixels: files, folders of files, or what is pixels already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from heedful.copies import first_line
from heedful.core.errors import FieldError, HeedfulError
from heedful.diagnosis.texts import Source, Texts, Windows, files_in

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
MOST = 4 << 30  # bytes of pixels that are held without a word
GOOD = "processor(image, return_tensors='pt').pixel_values, or Path('pictures')"


def _refuse(value: object, rule: str, good: object = Path("pictures")) -> FieldError:
    return FieldError("diagnose()", "texts", value, rule, good)


def images(given: Texts, reader: Any) -> Windows:
    """Each image a window of its own; files as the model's own `reader` prepares them.

    A file of a folder that cannot be read is left out, and told; one that is named is an error.
    """
    rows: list[Tensor] = []
    names: list[str] = []
    skipped: list[str] = []
    size = 0
    for source, pixels in _each(given, reader):
        if source.unread:
            skipped.append(f"{source.name} {source.unread}")
            continue
        for one in pixels:
            size += one.numel() * one.element_size()
            if size > MOST:
                rule = f"take over {MOST >> 30} GB as pixels, which are held at once: read parts, and add profiles up"
                raise _refuse(f"more than {len(rows)} images", rule, "diagnose(model, some) + diagnose(model, others)")
            rows.append(one)
            names.append(source.name)
    if not rows:
        raise _refuse(str(given), "holds no image that can be read" + "".join(f"; {x}" for x in skipped[:3]))
    of = tuple(range(len(rows)))
    return Windows(tuple(rows), Source(names[0]), len(rows), 0, tuple(skipped), of, tuple(names))


def _each(given: Texts, reader: Any) -> Iterator[tuple[Source, Tensor | Sequence[Tensor]]]:
    """Images by name, with their pixels, or why they have none."""
    if isinstance(given, Path):
        if not given.exists():
            raise _refuse(str(given), "no such file or folder")
        found = files_in(given, ENDINGS) if given.is_dir() else [given]
        if not found:
            raise _refuse(str(given), f"the folder holds no file that ends in {', '.join(ENDINGS)}")
        prepare = processor_of(reader)
        for path in found:
            pixels, why = _read(path, prepare)
            if why and path == given:
                raise _refuse(str(path), why)
            yield Source(str(path), found=True, unread=why), pixels
    elif isinstance(given, Tensor) and given.ndim in (3, 4) and given.is_floating_point():
        yield Source("image"), given if given.ndim == 4 else [given]
    elif isinstance(given, Sequence) and not isinstance(given, str) and given:
        for one in given:
            yield from _each(one, reader)
    else:
        rule = (
            "a model that reads images takes their pixels, [c rows cols], a batch [b c rows cols], files or folders "
            "of them, as Path, or a list of these"
        )
        raise _refuse(type(given).__name__, rule, GOOD)


def processor_of(reader: Any) -> ImageProcessingMixin:
    """What prepares images for the model, alone or in a processor of images and text."""
    found = getattr(reader, "image_processor", reader)
    if not isinstance(found, ImageProcessingMixin):
        rule = (
            "reading image files needs the model's image processor, and the model came without one: save it beside the "
            "model with processor.save_pretrained(folder), or pass it"
        )
        raise FieldError("diagnose()", "tokenizer", reader, rule, "AutoImageProcessor.from_pretrained(...)")
    return found


def _read(path: Path, processor: Any) -> tuple[list[Tensor], str]:
    """A file's pixels as the model takes them, and why there are none."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise HeedfulError("reading image files needs one more package: pip install pillow") from error
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        pixels = torch.as_tensor(processor(images=upright, return_tensors="pt")["pixel_values"])
    except UnidentifiedImageError:
        return [], "is no image that can be read"
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # as PIL has them
        return [], f"cannot be read ({first_line(error)})"
    if pixels.ndim != 4 or len(pixels) != 1:
        return [], f"becomes {tuple(pixels.shape)} in this model's processor, which is not one image"
    return [pixels[0]], ""
