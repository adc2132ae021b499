"""What a method remembers belongs to a text: beams, batches of unlike texts, and texts in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heedful.adapters.cache_name import CACHE, cache_of
from heedful.api import attach
from heedful.conformance.bare import ROLES
from heedful.conformance.model_laws import for_text
from heedful.conformance.place import place
from heedful.conformance.subjects import text, tiny_model
from heedful.conformance.tolerances import close_model, error
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.method import Method
from heedful.engine.run import Run

SHORT = 16  # tokens of the shorter prompt
LATER = ((7, 11), (13, 17), (19, 23))  # tokens that two rows go on with


@dataclass(frozen=True)
class _Rows:
    """Rows of texts, each padded on its left, and the cache of what was read so far."""

    run: Run
    mask: Tensor  # [b n]
    cache: Any = field(default=None)

    def go_on(self, ids: Tensor) -> tuple[Tensor, _Rows]:
        """Logits `[b v]` after the last of these tokens `[b n]`, and the rows with them."""
        mask = self.mask
        if self.cache is not None:
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        place = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # as `generate` gives them
        out = self.run(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True, **{CACHE: self.cache})
        return out.logits[:, -1], _Rows(self.run, mask, cache_of(out))

    def reordered(self, rows: list[int]) -> _Rows:
        """The same cache with these rows, as beam search would have them."""
        self.cache.reorder_cache(torch.tensor(rows))
        return replace(self, mask=self.mask[rows])


@contextmanager
def _attached(method: Method) -> Iterator[Run]:
    with torch.no_grad():
        torch.manual_seed(0)  # parameters that a method draws
        with attach(tiny_model("llama"), method, roles=ROLES) as run:
            yield run


def _tokens(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, device=place())


def _alone(method: Method, prompt: Tensor, later: tuple[int, ...]) -> list[Tensor]:
    """Logits `[1 v]` after a prompt `[1 n]` and after each token that follows, under a run of their own."""
    with _attached(method) as run:
        found, rows = _Rows(run, torch.ones_like(prompt)).go_on(prompt)
        out = [found]
        for token in later:
            found, rows = rows.go_on(_tokens([token]))
            out.append(found)
    return out


def _compare(found: Tensor, requested: list[Tensor], what: str) -> None:
    want = torch.cat(requested)
    if not close_model(found, want):
        raise Broken(f"{what}, logits differ from the text alone by {error(found, want):.2g}")


@law("beams, batches of unlike texts, and two texts in turn equal each text alone")
def each_text_alone(method: Method) -> None:
    for_text(method)
    if all(edit.reads for edit in method.edits):
        raise DoesNotApply("reads only, and so leaves every logit as it was")
    long, short = text()[:1], text(1)[:1, :SHORT]
    (a, b), (c, d), (e, f) = LATER
    one, other = _alone(method, long, (a, d)), _alone(method, short, (b, c, e))
    third = _alone(method, short, (b, c, f))

    with _attached(method) as run:
        pad = long.new_zeros(1, long.shape[1] - SHORT)
        ids = torch.cat([long, torch.cat([pad, short], 1)])
        mask = torch.ones_like(ids)
        mask[1, : pad.shape[1]] = 0
        found, rows = _Rows(run, mask).go_on(ids)
        _compare(found, [one[0], other[0]], "in a batch")
        found, rows = rows.go_on(_tokens([a], [b]))
        _compare(found, [one[1], other[1]], "in a batch, after a token")
        found, rows = rows.reordered([1, 0]).go_on(_tokens([c], [d]))
        _compare(found, [other[2], one[2]], "with its beams in another order")
        found, _ = rows.reordered([0, 0]).go_on(_tokens([e], [f]))
        _compare(found, [other[3], third[3]], "with two beams from one")

    with _attached(method) as run:
        first, second = (_Rows(run, torch.ones_like(x)) for x in (long, short))
        found, first = first.go_on(long)
        _compare(found, one[:1], "in turn with another text")
        found, second = second.go_on(short)
        _compare(found, other[:1], "in turn with another text")
        for i, (x, y) in enumerate(((a, b), (d, c)), 1):
            found, first = first.go_on(_tokens([x]))
            _compare(found, one[i : i + 1], "in turn with another text")
            found, second = second.go_on(_tokens([y]))
            _compare(found, other[i : i + 1], "in turn with another text")
