"""Where an image's patches stand among a vision model's tokens, as far as that is certain."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from heedful.core.regions import Region

# learned tokens that vision models put before the patches, by the name of their parameter
CLASS_TOKENS = ("cls_token", "class_embedding")  # it comes first
CLASS = "class token"
BEFORE_PATCHES = (*CLASS_TOKENS, "distillation_token", "register_tokens")
PICTURES = ("pixel_values", "x", "image", "hidden_states")  # what models call a batch of images, [b c rows cols]
Grid = tuple[int, int]


def grid_of(model: nn.Module, inputs: dict[str, Any]) -> Grid | None:
    """Rows and columns of patches of the images that a model is given; None where it does not say."""
    pixels = next((inputs[name] for name in PICTURES if name in inputs), None)
    config = getattr(model, "config", None)
    owners = (getattr(model, "patch_embed", None), model) if config is None else (config,)
    size = next((found for owner in owners if (found := getattr(owner, "patch_size", None)) is not None), None)
    sizes = (size, size) if isinstance(size, int) else tuple(size or ())
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(sizes) != 2 or not all(sizes):
        return None
    (rows, over), (cols, more) = (divmod(n, step) for n, step in zip(pixels.shape[2:], sizes, strict=True))
    return None if over or more else (rows, cols)


def before_patches(model: nn.Module) -> int:
    """How many tokens stand before the patches of an image."""
    told = getattr(model, "num_prefix_tokens", None)
    if isinstance(told, int):
        return told
    named = [x for name, x in model.named_parameters() if name.rpartition(".")[2] in BEFORE_PATCHES]
    return sum(x.shape[-2] if x.ndim > 1 else 1 for x in named)


def names_before(model: nn.Module) -> list[str]:
    """What each token before the patches is: the class token, where there is one, then registers."""
    count = before_patches(model)
    first = [CLASS] if any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in model.named_parameters()) else []
    return [*first, *(f"register {i}" for i in range(1, count - len(first) + 1))][:count]


def regions(model: nn.Module, grid: Grid, tokens: int) -> dict[str, Region]:
    """What an image's tokens are, if they are what stands before patches in this model, and these.

    The `patches`, those at its `border`, the class token, `cls`, and what else is learned, `register`.
    """
    named, (rows, cols) = names_before(model), grid
    before = len(named)
    if tokens - before != rows * cols:
        return {}
    found = {"patches": Region(((before, tokens),), grid)}
    if rows > 2 and cols > 2:
        sides = [(before + i * cols - 1, before + i * cols + 1) for i in range(2, rows - 1)]
        found["border"] = Region(((before, before + cols + 1), *sides, (tokens - cols - 1, tokens)))
    first = named.count(CLASS)
    if first:
        found["cls"] = Region(((0, 1),))
    if before > first:
        found["register"] = Region(((first, before),))
    return found
