"""What scores are used for beside the softmax that makes weights of them: an edit of them would not reach it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from heedful.adapters.operations import products

# what takes a tensor for its shape or its type alone
_PATTERNS = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_tensor",
})  # fmt: skip
_LIKE = frozenset({"expand_as", "view_as", "type_as", "reshape_as", "to"})  # the same of all but their first
# what gives a tensor's numbers, or its memory, to whatever is no tensor
READS = frozenset({
    "item", "tolist", "numpy", "equal", "allclose", "__bool__", "__float__", "__int__", "__index__", "__complex__",
    "__array__", "__contains__", "__dlpack__", "data_ptr", "storage", "untyped_storage",
})  # fmt: skip
_EXP = frozenset({"exp", "exp_", "exp2", "exp2_"})
_WITHIN = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"})


@dataclass(eq=False)
class Use:
    """What was made of scores: themselves, a step later, or something else."""

    origin: Origin
    by: str = ""  # what first made something else of them
    part: tuple[Any, ...] | None = None  # where the scores are that it is, but for what was added to them
    used: bool = False  # something else was made of it in turn, or it came back to the scores


@dataclass(eq=False)
class Origin:
    """A product that scores came of."""

    others: list[Use] = field(default_factory=list)
    fixed: bool = False  # of what is the same for all texts, as a projection's weight is
    left: str = ""  # the module that multiplied its weights with values, once it is left

    @property
    def elsewhere(self) -> str:
        """What else its scores were used for, if that came to something."""
        return next((f"its scores go into {use.by} too" for use in self.others if not use.used), "")


@dataclass(eq=False)
class Uses:
    """Tensors that came of products, in one forward; none is kept."""

    later: dict[str, str] = field(default_factory=dict)  # what scores are used for once their module is left
    _known: dict[int, tuple[ReferenceType[Tensor], tuple[Use, ...]]] = field(default_factory=dict)  # while they live

    def of(self, x: Tensor) -> tuple[Use, ...]:
        return self._known[id(x)][1] if id(x) in self._known else ()

    def note(self, x: Tensor, *uses: Use) -> None:
        place = id(x)
        self._known[place] = (ref(x, lambda _: self._known.pop(place, None) and None), uses)

    def exponents(self, given: Iterable[Tensor]) -> bool:
        """Whether one of these came of the exponents of scores, as weights do that are written without a softmax."""
        return any(use.by in _EXP and not use.origin.fixed for x in given for use in self.of(x))

    def goes_on(
        self, scores: Tensor, origin: Origin, func: Any, args: Any, kwargs: Any, others: Iterable[Tensor], out: Tensor
    ) -> None:
        """Scores became others by a step that is followed."""
        uses, more = [use for x in others for use in self.of(x)], list[Use]()
        for use in uses:
            if use.origin is origin:
                use.used = True
            else:
                more.append(self._other(use, func))
        if mine := self.of(scores):
            self._parts(func, args, kwargs, uses, more, out)
            self.note(out, *mine, *more)

    def aside(self, func: Any, args: Any, kwargs: Any, given: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """Something else was made of what came of a product."""
        name, made = name_of(func), list(made)
        uses = [use for x in given for use in self.of(x)]
        if not uses or takes_shape(func, args, self._known) or not (made or name in READS or name == "__setitem__"):
            return
        for use in uses:
            use.used = True
        new = tuple(self._other(use, func) for use in {id(use.origin): use for use in uses}.values())
        if len(made) == 1:
            self._parts(func, args, kwargs, uses, new, made[0])
        for x in made:
            self.note(x, *new)

    def _parts(self, func: Any, args: Any, kwargs: Any, uses: Iterable[Use], new: Iterable[Use], made: Tensor) -> None:
        """Say of what was made whether it is some places of scores, or these and what was added to them."""
        first = self.of(args[0]) if args and isinstance(args[0], Tensor) else ()
        for one in new:
            of = [use for use in uses if use.origin is one.origin]
            if len(of) != 1:
                continue
            if func is Tensor.__getitem__ and not of[0].by:
                one.part = place_of(made)
            elif func in products.SAME or products.sums(func, kwargs, of[0] in first):
                one.part = of[0].part
                one.used = func in products.PLUS and place_of(made) == one.part  # it lies among the scores

    def _other(self, use: Use, func: Any) -> Use:
        use.used, new = True, Use(use.origin, use.by or name_of(func))
        use.origin.others.append(new)
        if use.origin.left:
            self.later[use.origin.left] = use.origin.elsewhere
        return new


def place_of(x: Tensor) -> tuple[Any, ...]:
    """Which numbers a tensor is of those in its memory."""
    return x.data_ptr(), x.shape, x.stride()


def takes_shape(func: Any, args: Any, known: Collection[int]) -> bool:
    """Whether a call wants no more of known tensors than what they are like."""
    name = name_of(func)
    return name in _PATTERNS or (name in _LIKE and bool(args) and id(args[0]) not in known)


def name_of(func: Any) -> str:
    """A function as people write it."""
    name = str(getattr(func, "__name__", func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def written_by(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that a call writes into, as far as its name tells."""
    name = name_of(func)
    into = kwargs.get("out")
    if name in _WITHIN or kwargs.get("inplace") or (name.endswith("_") and not name.endswith(("__", "grad_"))):
        into = args[0] if args else kwargs.get("input")
    if not isinstance(into, Tensor):
        return None
    part = into[args[1]] if name == "__setitem__" else into
    return part if part is into or part._is_view() else into


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may lie in the same memory."""
    if a is b:
        return True
    if not (a.numel() and b.numel()) or a.device != b.device or not (a.data_ptr() and b.data_ptr()):
        return False
    (a_0, a_1), (b_0, b_1) = _reach(a), _reach(b)
    return a_0 < b_1 and b_0 < a_1


def _reach(x: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize
