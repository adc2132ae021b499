"""Tokens that were merged or dropped between layers: where those that are left stand, and how all part again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.core.call import Call, Merged
from heedful.core.mask import Padding
from heedful.core.method import Step
from heedful.core.positions import Positions


@dataclass(frozen=True, eq=False)
class Merges:
    """What has become of the tokens of one list of layers in one forward."""

    layer: int  # the last one behind which some were merged
    to: Tensor  # [b n], the number that each token has now; -1: it was dropped
    places: Positions  # of those that are left: each stands where the first of its tokens stood
    dropped: Tensor | None  # [b n e], with the stream of those that were dropped, as it was then

    @property
    def even(self) -> bool:
        """Whether as many are left in every row, so that none of the places is empty."""
        return self.places.is_filled is None

    @property
    def sizes(self) -> Tensor:
        """How many of the tokens that entered the list each is made of that is left, `[b m]`; 0 in an empty place."""
        left = len(self.places)
        counts = self.to.new_zeros(len(self.to), left + 1)
        return counts.scatter_add(1, self.to.where(self.to >= 0, left), torch.ones_like(self.to))[:, :left]

    def parted(self, stream: Tensor) -> Tensor:
        """The stream `[b m e]` of all tokens `[b n e]`: each has that of the one it went into."""
        left = self.to >= 0
        number = self.to.clamp(min=0)[..., None].expand(-1, -1, stream.shape[-1])
        found = stream.gather(1, number)
        return found if self.dropped is None else torch.where(left[..., None], found, self.dropped)


def merge(step: Step, stream: Tensor, new: Merged, call: Call, before: Merges | None) -> Merges:
    """What has become of the tokens once a step has merged those of a layer's stream `[b n e]`."""
    if not step.edit.merges:
        raise step.fault(call, "merges tokens and does not say so; mark it @at(Site.RESIDUAL, merges=True)")
    require_own_keys(step, call)
    _require_free(step, call)
    _require_shapes(step, call, stream, new)
    first = _firsts(step, call, new)
    filled = first < new.to.shape[1]
    at = first.clamp(max=new.to.shape[1] - 1)[:, None]

    def pick(x: Tensor) -> Tensor:
        return x.expand(len(at), *x.shape[1:]).gather(2, at.expand(-1, x.shape[1], -1))

    queries = call.queries
    is_filled = None if bool(filled.all()) else filled[:, None]
    if queries.is_filled is not None:
        was = pick(queries.is_filled)
        is_filled = was if is_filled is None else was & is_filled
    places = Positions(pick(queries.index), pick(queries.position), pads=queries.pads, is_filled=is_filled)
    to, whole = new.to, stream
    if before is not None:
        known, whole = before.to, before.parted(stream)
        to = torch.where(known >= 0, to.gather(1, known.clamp(min=0)), -1)
    return Merges(call.layer, to, places, whole if bool((to < 0).any()) else None)


def require_own_keys(step: Step, call: Call) -> None:
    """Refuse layers whose keys are not those of the tokens that would be merged."""
    if call.cross or len(call.queries) != len(call.keys):
        raise step.fault(call, "tokens are merged where each attends to all, and here keys are another sequence's")


def _require_free(step: Step, call: Call) -> None:
    """Refuse layers in which a token stands for more than itself."""
    if call.mask.causal:
        raise step.fault(call, "the model is causal, and a token merged with later ones would tell what comes next")
    if strange := next((rule for rule in call.mask.rules if not isinstance(rule, Padding)), None):
        raise step.fault(call, f"the model's {type(strange).__name__} mask speaks of tokens by number")
    if call.queries.packed:
        raise step.fault(call, "several texts are packed into one row, and their tokens would be merged")


def _require_shapes(step: Step, call: Call, stream: Tensor, new: Merged) -> None:
    b, n, e = stream.shape
    fits = new.stream.ndim == 3 and new.stream.shape[::2] == (b, e) and 1 <= new.stream.shape[1] <= n
    if not fits or new.to.shape != (b, n) or new.to.dtype != torch.long:
        got = f"{tuple(new.stream.shape)} and {new.to.dtype} {tuple(new.to.shape)}"
        raise step.fault(call, f"a Merged of {(b, n, e)} is a stream [{b} m {e}] and `to`, long [{b} {n}]; got {got}")


def _firsts(step: Step, call: Call, new: Merged) -> Tensor:
    """The number of the first old token of each new one, `[b m]`; that of no token where a place is empty."""
    (b, n), m = new.to.shape, new.stream.shape[1]
    if bool(((new.to < -1) | (new.to >= m)).any()):
        raise step.fault(call, f"`to` numbers the {m} tokens left from 0 up, and is -1 where a token is dropped")
    own = torch.arange(n, device=new.to.device).expand(b, -1)
    first = own.new_full((b, m + 1), n).scatter_reduce(1, new.to.where(new.to >= 0, m), own, "amin")[:, :m]
    ordered = (first.diff(dim=-1) > 0) | (first[:, 1:] == n)
    if not bool(ordered.all() & (first[:, 0] < n).all() & (first[:, -1] < n).any()):
        raise step.fault(
            call,
            "the tokens left stand in the order of the first that each is made of, some in every row, with "
            "empty places behind them where other rows have more; heedful.kit.merging.numbered gives such numbers",
        )
    return first
