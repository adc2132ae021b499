"""Attention patterns of one short text, whole: to look at, to index, to draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heedful.adapters.grids import grid_of, names_before
from heedful.adapters.wrapped import inside
from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import Code, FieldError
from heedful.core.figures import Grid, Head, counted, head_name
from heedful.core.kinds.loaded import Tokenizer, words_of
from heedful.core.method import Method, Part, Stack, as_stack
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.explaining.aim import fed, pairs, spelled_in_order
from heedful.explaining.site_values import require_once
from heedful.models import Loaded

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST = 1 << 30  # bytes of maps that are kept without a word


@dataclass(frozen=True, eq=False)
class Picture:
    """An image whose patches are tokens."""

    pixels: Tensor  # [c rows cols], as the model gets them
    grid: tuple[int, int]  # rows and columns of patches
    before: list[str]  # what the tokens are that stand before the patches


@dataclass(frozen=True, eq=False)
class Patterns:
    """`patterns[layer]` is `[h q k]`, `patterns[layer, head]` is `[q k]`; rows are queries. A notebook shows them."""

    tokens: list[str]
    maps: Mapping[int, Tensor]  # by layer [h q k]
    heads: Mapping[int, list[int]]  # by layer, which heads these are
    text: frozenset[int] | None = None  # the layers that read these tokens, and no image; None: all
    picture: Picture | None = None  # what is looked at, where all tokens are an image's

    def __getitem__(self, place: int | Head) -> Tensor:
        layer, head = place if isinstance(place, tuple) and len(place) == 2 else (place, None)
        if not isinstance(layer, int) or layer not in self.maps:
            rule = f"must be one of {list(self.maps)}, or such a one and a head of it"
            raise FieldError("Patterns", "[layer]", layer, rule, next(iter(self.maps)))
        if head is None:
            return self.maps[layer]
        if head not in self.heads[layer]:
            rule = f"layer {layer} has the heads {self.heads[layer]} here"
            raise FieldError("Patterns", "[layer, head]", place, rule, (layer, self.heads[layer][0]))
        return self.maps[layer][self.heads[layer].index(head)]

    @property
    def tensor(self) -> Tensor:
        """All of them, `[layers h q k]`, where every layer has the same number."""
        shapes = {tuple(x.shape) for x in self.maps.values()}
        if len(shapes) > 1:
            rule = "layers differ in shape; take one layer at a time, as in patterns[3]"
            raise FieldError("Patterns", "tensor", sorted(shapes), rule, "patterns[3]")
        return torch.stack(list(self.maps.values()))

    def names(self, count: int, layer: int | None = None) -> list[str]:
        """The tokens with their places; places alone where the axis is another sequence's, such as an image's."""
        reads_text = self.text is None or layer is None or layer in self.text
        words = self.tokens if reads_text and len(self.tokens) == count else [""] * count
        return [f"{i} {word}".strip() for i, word in enumerate(words)]

    @asks
    def figure(self, layer: int, head: int) -> Grid:
        values = self[layer, head]
        q, k = (self.names(n, layer) for n in values.shape)
        what = "The share of its attention that each token (a row) gives to each token (a column)."
        title = f"Pattern of head {head_name(layer, head)}"
        return Grid(f"pattern_{layer}_{head}", title, what, values, q, k, "query", "key", "share")

    @asks
    def plot(self, layer: int, head: int) -> go.Figure:
        """One head's pattern as a plotly figure."""
        from heedful.report.plots import draw

        return draw(self.figure(layer, head))

    @asks
    def page(self, path: str | Path) -> Path:
        """Write the view of all of them: one HTML file that needs nothing else."""
        from heedful.report.maps import render
        from heedful.report.page import put

        return put(render(self), path)

    def __repr__(self) -> str:
        many = sum(len(x) for x in self.maps.values())
        q, k = next(iter(self.maps.values())).shape[1:]
        size = f"{counted(len(self.maps), 'layer')}, {counted(many, 'head')}, {q} x {k}"
        if self.picture is not None:
            return f"Patterns({size}: {' x '.join(map(str, self.picture.grid))} patches)"
        return f"Patterns({size}: {''.join(self.tokens)[:60]!r})" if self.tokens else f"Patterns({size})"

    def _repr_html_(self) -> str:
        from heedful.report.maps import render

        frame = '<iframe title="Attention patterns" style="width:100%;height:640px;border:0" srcdoc="{}"></iframe>'
        return frame.format(escape(render(self)))


class _Whole(Method):
    """Keeps the pattern of a text as it is."""

    tokens: int  # how many tokens the text has; 0 where nobody knows beforehand
    layers: int | None  # how many layers are kept; None for all

    def __repr__(self) -> str:
        return "patterns()"

    @reads(Site.PATTERN, first="tokens")
    def keep(self, weights: Tensor, call: Call) -> Statistic:
        b, h, r, _ = weights.shape
        if b != 1:
            raise FieldError("patterns()", "text", b, "must be one text; take texts one at a time", Code("texts[0]"))
        stop = int(call.keys.index.max()) + 1
        whole = max(self.tokens, stop)  # the first rows see few keys, and those to come all
        size = 4 * (self.layers or call.depth) * h * (self.tokens or stop) * whole
        if size > MOST:
            rule = f"makes maps of {size / 1e9:.1f} GB; name fewer heads, cut the text, or read it with diagnose()"
            good = f"{int(whole * (MOST / size) ** 0.5)} tokens"
            raise FieldError("patterns()", "text", f"{whole} tokens", rule, good)
        shown = weights.new_zeros(h, r, stop)
        shown[..., call.keys.index[0, 0]] = weights[0]
        rows = f"{call.rows.start or 0:09d}"
        require_once("patterns()", call, rows)
        return Cat.of(rows, shown)


@torch.no_grad()
@asks
def patterns(
    model: nn.Module | Loaded,
    text: str | Tensor | Iterable[int] | Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    heads: Iterable[Head] | None = None,
    stack: Part | Stack | None = None,
    **how: Any,
) -> Patterns:
    """The attention patterns of one text: of every head, or of the `heads` named as (layer, head).

    `text` is a string, token ids, the pixels of one image, or all that the model is called with; of a model that is
    none of transformers, its first argument. Under a `stack`, the patterns are those that it leaves. `how` goes to
    `attach`. Maps grow with the square of the text: `diagnose` reads long ones.
    """
    given = model if isinstance(model, Loaded) else Loaded(inside(model), None, "")
    words = words_of(tokenizer or given.tokenizer)
    inputs = fed("patterns()", given.model, text, words)
    ids = inputs.get("input_ids")
    tokens = 0 if ids is None else ids.shape[-1]
    wanted = {} if heads is None else pairs("patterns()", heads)
    if heads is not None and not wanted:
        raise FieldError("patterns()", "heads", [], "names none; leave it out for all", [(3, 1)])
    reader = _Whole(tokens, len(wanted) or None)
    parts: list[Part] = [reader.on(layer, mine) for layer, mine in wanted.items()]
    parts = parts or [reader]
    with still(given.model), attach(given.model, Stack((*as_stack(stack), *parts)), **how) as run:
        with _readers(given.model, ids, () if ids is None else run.layer_names) as readers:
            run(**inputs)
        text = frozenset(n for n, name in enumerate(run.layer_names) if any(map(name.startswith, readers)))
        found = {layer: stat for part in parts for layer, stat in run[part].items()}
    maps = {layer: _joined(stat.value) for layer, stat in sorted(found.items())}
    named = {layer: wanted.get(layer) or list(range(len(x))) for layer, x in maps.items()}
    if ids is None:
        return Patterns([], maps, named, picture=_picture(given.model, inputs))
    second = inputs.get("decoder_input_ids", ids)
    unsure = second.shape == ids.shape and not torch.equal(second, ids)  # an axis would not tell whose words it has
    return Patterns([] if unsure else spelled_in_order(ids[0], words), maps, named, text if readers else None)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """The map whose rows these tiles are, the later ones of which may have seen more keys."""
    widest = max(x.shape[2] for x in rows)
    return torch.cat([torch.nn.functional.pad(x, (0, widest - x.shape[2])) for x in rows], 1)


def _picture(model: nn.Module, inputs: dict[str, Any]) -> Picture | None:
    if (pixels := inputs.get("pixel_values")) is None or (grid := grid_of(model, {"pixel_values": pixels})) is None:
        return None
    return Picture(pixels[0].float().cpu(), grid, names_before(model))


@contextmanager
def _readers(model: nn.Module, ids: Tensor | None, layers: Iterable[str]) -> Iterator[list[str]]:
    """What names of layers begin with that the token ids enter: the least part with attention around their table."""
    found: list[str] = []

    def note(name: str, given: Any) -> None:
        if ids is None or not isinstance(given, Tensor) or not torch.equal(given, ids):
            return
        while name and not any(layer.startswith(f"{name}.") for layer in layers):
            name = name.rpartition(".")[0]
        found.append(f"{name}." if name else "")

    tables = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0] if args else None))
        for name, module in tables
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
