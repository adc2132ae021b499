"""The named places of an attention call, in the order in which they happen.

Shape letters, here and everywhere: b batch, n tokens, e width, h query heads, g key/value heads, q queries, k keys,
r the query rows of one tile, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from heedful.core.errors import DefinitionError

F = TypeVar("F", bound=Callable[..., Any])


class Site(Enum):
    """A place where a method may act; definition order is execution order."""

    EMBEDDING = ("[b n e]", "tokens or patches as they enter the first layer")
    HIDDEN = ("[b n e]", "the attention block's input")
    QUERY = ("[b h q d]", "queries after projection and rotary embedding")
    KEY = ("[b g k d]", "keys after projection, rotary embedding and cache")
    VALUE = ("[b g k d]", "values after projection and cache")
    MASK = ("Mask", "which query-key pairs are computed")
    SCORES = ("[b h r k]", "scaled, soft-capped and biased scores of a tile of query rows, before the mask")
    NORMALISE = ("[b h r k]", "masked scores to weights; softmax unless a method replaces it")
    PATTERN = ("[b h r k]", "the weights of a tile of query rows")
    MIX = ("q, k, v -> [b h q d]", "replaces SCORES, NORMALISE and PATTERN as a whole")
    HEAD_OUTPUT = ("[b h q d]", "what each head hands to the output projection")
    CACHE = ("CachedKV -> keep [b g k] or Kept", "which keys and values the next step will see, and as what")
    BLOCK = ("[b n e]", "replaces everything from HIDDEN to OUTPUT: takes the block's input, gives its output")
    OUTPUT = ("[b n e]", "after the output projection, on its way into the residual stream")
    RESIDUAL = ("[b n e]", "the residual stream as it leaves the layer that holds the attention")

    def __init__(self, shape: str, meaning: str) -> None:
        self.shape = shape
        self.meaning = meaning
        self.order = len(type(self).__members__)

    def __repr__(self) -> str:
        return f"Site.{self.name}"

    __hash__ = object.__hash__  # each is there once; an Enum's own hash is a function in Python, and asked all the time

    @property
    def inside(self) -> bool:
        """Whether it lies between the projections of the block, whatever is done there."""
        return Site.QUERY.order <= self.order <= Site.CACHE.order


MAP_SITES = frozenset({Site.SCORES, Site.NORMALISE, Site.PATTERN})
SINGLE_SITES = frozenset({Site.NORMALISE, Site.MIX, Site.BLOCK})
HEADLESS_SITES = frozenset({Site.EMBEDDING, Site.HIDDEN, Site.BLOCK, Site.OUTPUT, Site.RESIDUAL})


class Edit(NamedTuple):
    """One marked function of a method class."""

    site: Site
    reads: bool = False
    name: str = ""  # the function's
    sums: tuple[str, ...] = ()  # the parts of the pattern's summary that it reads instead of tiles
    reweights: bool = False  # it moves weight between whole columns, see `core.reweight`
    loss: bool = False  # what it reads is a differentiable number
    when: str = ""  # the field without which there is no such step
    first: str = ""  # the field that says how many of a call's first rows it reads
    before_rotary: bool = False  # it asks for queries and keys as they are before the rotary embedding
    training: bool | None = None  # True: there is such a step in modules that train alone; False: in those at rest
    merges: bool = False  # it may leave fewer tokens than there were
    weighs: bool = False  # it says what each weight is of its score, see `core.weighing`
    adds: bool = False  # it says what scores gain, and is not shown them
    by_distance: bool = False  # and it goes by how far apart tokens are


def marking(edit: Edit) -> Callable[[F], F]:
    """A decorator that marks a method's function as that edit, under the function's name."""

    def mark(function: F) -> F:
        function.__heedful_edit__ = edit._replace(name=function.__name__)  # type: ignore[attr-defined]
        return function

    return mark


def at(
    site: Site, when: str = "", *, before_rotary: bool = False, training: bool | None = None, merges: bool = False
) -> Callable[[F], F]:
    """Mark a method's function as the edit of a site: it takes the site's value and returns the new one.

    `when` names a field of the method: where that is false, 0 or None there is no such step, and no backend is blocked.
    `before_rotary` is for methods with positions of their own: a MIX is handed queries and keys that the model has not
    rotated, a BLOCK finds them, and the values, in its call. The layer's QUERY, KEY and cache hold them so too.
    `training` is for what is done while a module trains alone (True), or at rest alone (False).
    `merges` is for a RESIDUAL that leaves fewer tokens to the layers behind it, by returning a `Merged`.
    """
    if before_rotary and site not in (Site.MIX, Site.BLOCK):
        raise DefinitionError(f"@at({site}, before_rotary=True): only MIX and BLOCK replace all that reads positions")
    if merges and site is not Site.RESIDUAL:
        raise DefinitionError(f"@at({site}, merges=True): tokens are merged in the stream between layers, at RESIDUAL")
    return marking(Edit(site, when=when, before_rotary=before_rotary, training=training, merges=merges))


def adds(function: F) -> F:
    """Mark a function that takes the call, a tile, and returns what its scores gain, in place of an edit of SCORES.

    That is `[b|1, h|1, r|1, k|1]`, or None for nothing. It may depend on anything but the scores, so kernels can add it
    for themselves. Minus infinity says that a pair is not to be seen, which costs less where MASK leaves it out; nan
    and plus infinity are refused.
    """
    return marking(Edit(Site.SCORES, adds=True))(function)


def adds_by_distance(function: F) -> F:
    """Mark a function that takes whole distances `[m]` and the call, and returns what scores gain there, `[h|1 m]`.

    A distance is how far a key stands behind its query. It is as `@adds`, where a kernel need ask but once a call.
    """
    return marking(Edit(Site.SCORES, adds=True, by_distance=True))(function)


def reads(site: Site, when: str = "", first: str = "") -> Callable[[F], F]:
    """Mark a method's function as a reader of a site: it takes the site's value and returns a statistic.

    `first` names a field of the method that says how many of a call's first query rows it wants. A PATTERN reader of
    few rows rules no backend out: unless something edits the map, other than by `adds` or `weighs`, its rows are
    computed once more, for it alone.
    """
    if first and site is not Site.PATTERN:
        raise DefinitionError(
            f"@reads({site}, first={first!r}): only PATTERN is read by rows; take them from the tensor"
        )
    return marking(Edit(site, reads=True, when=when, first=first))


def penalises(site: Site, when: str = "") -> Callable[[F], F]:
    """Mark a function that takes the site's value and returns a differentiable number, as a tensor without axes.

    `run.loss()` adds these up over tiles and layers, and they join the model's own loss where labels are given.
    """
    return marking(Edit(site, reads=True, loss=True, when=when))
