"""A text that is read in pieces is one text: what they come to together, and what they came to so far."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from heedful.core.call import Call

Sums = dict[str, Tensor]


def added(call: Call, about: str, **found: Tensor) -> tuple[Sums | None, Sums] | None:
    """What the text's earlier pieces came to (None: this is the first), and what it comes to with this one.

    Tensors are `[b ... k]`, by text position where k counts tokens, and kept with the text's cache under `about`. None:
    this is no further piece of it, since tokens were decoded in between, or guessed and taken back.
    """
    kept, start, end = call.state.cache, call.queries.first or 0, f"{about}: end"
    before = None
    if start:
        if end not in kept or bool((kept[end] != start).any()):
            return None
        earlier = {name: kept[f"{about}: {name}"] for name in found}
        longest = {name: max(x.shape[-1], earlier[name].shape[-1]) for name, x in found.items()}
        before = {name: pad(x, (0, longest[name] - x.shape[-1])) for name, x in earlier.items()}
        found = {name: before[name] + pad(x, (0, longest[name] - x.shape[-1])) for name, x in found.items()}
    for name, x in found.items():
        kept[f"{about}: {name}"] = x
        kept[end] = call.queries.index.new_full((len(x),), start + len(call.queries))
    return before, found
