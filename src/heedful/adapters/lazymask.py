"""transformers' masks without the N x N tensor: the mask function, the padding and the offsets, kept as a rule.

A `LazyMask` has the shape `[b, 1, q, k]` of a mask and no storage. It stands for the mask that the model would have had
without us, additive or boolean: any operator that touches it gets that one, so a model that adds or inverts it computes
what it always did. Rows that a model cuts out, as where later layers go on with the last tokens alone, are a rule too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from heedful.core.errors import UnknownArgument
from heedful.core.mask import Causal, Mask, Padding, Rule
from heedful.core.positions import Pairs, Positions

LISTS = frozenset({"indices", "block_indices"})  # under which a model's own indexer hands over the keys that it chose
_NO_SKIPS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FunctionRule(Rule):
    """A mask function of transformers, which works on indices."""

    function: MaskFunction
    batch: int
    home: torch.device  # where it was made, and where tensors lie that it may know

    def keeps(self, pairs: Pairs) -> Tensor:
        device = pairs.queries.index.device
        row = torch.arange(self.batch, device=self.home)[:, None, None, None]
        head = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=self.home)
        return self.function(row, head, pairs.q_index.to(self.home), pairs.k_index.to(self.home)).to(device)


@dataclass
class MaskSpec:
    """Everything a mask function of transformers is called with."""

    arguments: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=dict)
    home: MaskSpec | None = None  # the same where the mask was made, on another device
    moved: dict[torch.device, MaskSpec] = field(default_factory=dict)
    cut: tuple[MaskSpec, slice] | None = None  # the mask of which these are some rows, and which

    @property
    def device(self) -> torch.device:
        return torch.device(self.arguments["device"])

    def on(self, device: torch.device) -> MaskSpec:
        """The same for layers on another device, made once a forward."""
        home = self.home or self
        if device == home.device:
            return home
        if device not in home.moved:
            there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in home.arguments.items()}
            home.moved[device] = MaskSpec({**there, "device": device}, home=home)
        return home.moved[device]

    def native(self, implementation: str) -> Tensor | None:
        """The mask that this implementation would have had; built once a forward, for layers left alone."""
        if implementation not in self.dense:
            if self.home is not None:
                found = self.home.native(implementation)
            elif self.cut is not None:
                whole, rows = self.cut
                found = whole.native(implementation)
                found = found if found is None or found.shape[2] == 1 else found[:, :, rows]
            elif implementation in ALL_MASK_ATTENTION_FUNCTIONS:
                found = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
            else:
                found = None
            self.dense[implementation] = found if found is None else found.to(self.device)
        return self.dense[implementation]

    def rows(self, start: int, stop: int) -> MaskSpec:
        """Some rows of it."""
        told = {**self.arguments, "q_offset": self.q_start + start, "q_length": stop - start}
        return MaskSpec(told, cut=(self, slice(start, stop)))

    @property
    def table(self) -> Tensor:
        """True where the pair is computed, `[b 1 q k]`."""
        return self._whole("table", sdpa_mask)

    @property
    def addend(self) -> Tensor:
        """0 where the pair is computed and the least number elsewhere, `[b 1 q k]`."""
        return self._whole("addend", eager_mask)

    def _whole(self, name: str, build: Callable[..., Tensor]) -> Tensor:
        if name not in self.dense:
            made = self.home or self  # a mask function may know tensors there
            self.dense[name] = build(**{**made.arguments, **_NO_SKIPS}).to(self.device)
        return self.dense[name]

    def _of_home(self, home: MaskSpec, name: str) -> Tensor | None:
        """What the mask knows of itself where it was made: there it is looked at once, and here moved."""
        found: Tensor | None = getattr(home, name)
        return None if found is None else found.to(self.device)

    @cached_property
    def padding(self) -> Tensor | None:
        """The 2-D padding mask `[b, n]`, None when every token is text."""
        if self.home is not None:
            return self._of_home(self.home, "padding")
        given = self.arguments["attention_mask"]
        return None if given is None or bool(given.all()) else given.bool()

    @cached_property
    def pad(self) -> Tensor | None:
        """How many padding tokens stand on the left of each row, `[b]`; None when there are none anywhere."""
        if self.home is not None:
            return self._of_home(self.home, "pad")
        if self.padding is None:
            return None
        left = self.padding.long().cummax(-1).values.logical_not().sum(-1)
        return left if bool(left.any()) else None

    @cached_property
    def position(self) -> Tensor | None:
        """Each token's number in its text `[b, n]`, where padding stands inside a text too; None where none does."""
        if self.home is not None:
            return self._of_home(self.home, "position")
        if self.padding is None:
            return None
        count = self.padding.long().cumsum(-1)
        inside = ~self.padding & (count > 0) & (count < count[:, -1:])
        return count - 1 if bool(inside.any()) else None

    @cached_property
    def mask(self) -> Mask:
        function = self.arguments["mask_function"]
        rules: list[Rule] = []
        if function is causal_mask_function:
            rules.append(Causal())
        elif function is not bidirectional_mask_function:
            rules.append(FunctionRule(function, self.arguments["batch_size"], (self.home or self).device))
        if self.padding is not None:
            rules.append(Padding(self.padding))
        return Mask(tuple(rules))

    @cached_property
    def q_start(self) -> int:
        return int(self.arguments["q_offset"])

    @cached_property
    def queries(self) -> Positions:
        start, n = self.q_start, self.arguments["q_length"]
        text = self.padding
        is_text = None if text is None or text.shape[1] < start + n else text[:, None, start : start + n]
        return self._row(start, n, is_text)

    @cached_property
    def keys(self) -> Positions:
        return self._row(int(self.arguments["kv_offset"]), self.arguments["kv_length"])

    def _row(self, start: int, n: int, is_text: Tensor | None = None) -> Positions:
        row = Positions.row(start, n, self.arguments["device"], self.pad, is_text)
        if self.position is None or self.position.shape[1] < start + n:
            return row
        return Positions(row.index, self.position[:, None, start : start + n], start, is_filled=is_text)


class LazyMask(Tensor):
    """A mask that has a shape, a rule, and no storage."""

    spec: MaskSpec

    @staticmethod
    def __new__(cls, spec: MaskSpec, additive: bool = False) -> LazyMask:
        a = spec.arguments
        shape = (a["batch_size"], 1, a["q_length"], a["kv_length"])
        dtype = a.get("dtype", torch.float32) if additive else torch.bool
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=spec.device)
        out.spec = spec
        return out

    @property
    def whole(self) -> Tensor:
        """The mask that this one stands for."""
        return self.spec.table if self.dtype == torch.bool else self.spec.addend

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyMask({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        asked = kwargs or {}
        if func is torch.ops.aten._to_copy.default and asked.get("dtype") in (None, args[0].dtype):
            device = asked.get("device") or args[0].device  # as a `device_map` has it, from layer to layer
            return cls(args[0].spec.on(torch.device(device)), args[0].dtype != torch.bool)
        if func is torch.ops.aten.alias.default:  # of slices that leave out nothing
            return cls(args[0].spec, args[0].dtype != torch.bool)
        if func is torch.ops.aten.slice.Tensor and (rows := _rows(*args, **asked)) is not None:
            return rows

        def dense(x: Any) -> Any:
            return x.whole if isinstance(x, LazyMask) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def _rows(
    mask: LazyMask, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyMask | None:
    """What a slice leaves of a mask, if that is a run of its rows, or all of it."""
    first, last, _ = slice(start, end).indices(mask.shape[dim])
    if step != 1 or (dim % mask.ndim != 2 and (first, last) != (0, mask.shape[dim])):
        return None
    spec = mask.spec if dim % mask.ndim != 2 else mask.spec.rows(first, max(first, last))
    return LazyMask(spec, mask.dtype != torch.bool)


def lazy_mask(  # noqa: PLR0913 - the signature is transformers'
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    allow_is_bidirectional_skip: bool = False,
    additive: bool = False,
    **more: Any,
) -> Tensor | None:
    """A mask function for transformers that builds nothing."""
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, kv_offset=kv_offset,
        # a static cache hands out its live counter and advances it before attention runs
        q_offset=q_offset.clone() if isinstance(q_offset, Tensor) else q_offset,
        mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip, **more,
    )  # fmt: skip
    if use_vmap or torch.compiler.is_compiling():
        return (eager_mask if additive else sdpa_mask)(**{**arguments, **_NO_SKIPS})
    spec = MaskSpec(arguments)
    if allow_is_bidirectional_skip and mask_function is bidirectional_mask_function and spec.padding is None:
        return None
    return LazyMask(spec, additive)


lazy_additive_mask = partial(lazy_mask, additive=True)


def chosen_pairs(module: nn.Module, more: dict[str, Any], heads: int, keys: int) -> Tensor | None:
    """A table `[b h|1 q k]` of the pairs that a model's own indexer chose; None when it chooses none besides."""
    if isinstance(found := more.get("indices"), Tensor):
        while found.ndim < 4:
            found = found[:, None]
        return _named(found, keys)
    if isinstance(found := more.get("block_indices"), Tensor):
        size = getattr(getattr(module, "indexer", None), "block_size", None)
        if not isinstance(size, int) or heads % found.shape[1]:
            raise UnknownArgument(
                f"{type(module).__name__} hands its attention a choice of key blocks, but does not tell their size"
            )
        table = _named(found, -(-keys // size)).repeat_interleave(size, -1)[..., :keys]
        return table.repeat_interleave(heads // found.shape[1], 1)
    return None


def _named(numbers: Tensor, count: int) -> Tensor:
    """Which of `count` slots the last axis names; -1 names none."""
    table = torch.zeros(*numbers.shape[:-1], count + 1, dtype=torch.bool, device=numbers.device)
    slots = numbers.long().masked_fill((numbers < 0) | (numbers >= count), count)
    return table.scatter_(-1, slots, True)[..., :count]
