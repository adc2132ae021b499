"""What a method remembers belongs to a text: beams, batches of unlike texts, texts in turn, and several in a row.

Methods of cross-attention are tried on answers to texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.place import place
from heedful.conformance.subjects import CROSS, SPLIT, TEXT, Subject, subjects_of, text, tiny_model
from heedful.conformance.tolerances import close_model, close_on_average, error
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.errors import SiteError, StatisticError
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


@dataclass(frozen=True)
class _Answers:
    """Rows of answers, and the texts that they answer, each padded on its right."""

    run: Run
    mask: Tensor  # [b k]
    texts: Tensor  # [b k]
    cache: Any = field(default=None)

    def go_on(self, ids: Tensor) -> tuple[Tensor, _Answers]:
        given = {"input_ids": self.texts, "attention_mask": self.mask, "decoder_input_ids": ids}
        out = self.run(**given, use_cache=True, **{CACHE: self.cache})
        return out.logits[:, -1], replace(self, cache=cache_of(out))

    def reordered(self, rows: list[int]) -> _Answers:
        self.cache.reorder_cache(torch.tensor(rows))
        return replace(self, mask=self.mask[rows], texts=self.texts[rows])


@contextmanager
def _attached(method: Method, subject: Subject) -> Iterator[Run]:
    with torch.no_grad(), subject.attach(tiny_model(subject.kinds[0]), method) as run:
        yield run


def _tokens(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, device=place())


def _begun(subject: Subject, run: Run, which: tuple[int, ...]) -> tuple[Tensor, Any]:
    """Logits `[b v]` after some of two unlike texts, or after the beginnings of their answers; what goes on there."""
    texts = [(text()[0], text(1)[0, :SHORT])[i] for i in which]
    length = max(len(one) for one in texts)
    ids = torch.zeros(len(which), length, dtype=torch.long, device=place())
    mask = torch.zeros_like(ids)
    for row, one in enumerate(texts):
        where = slice(length - len(one), length) if subject is TEXT else slice(len(one))
        ids[row, where], mask[row, where] = one, 1
    if subject is TEXT:
        return _Rows(run, mask).go_on(ids)
    return _Answers(run, mask, ids).go_on(text(2)[list(which)])


def _alone(method: Method, subject: Subject, which: int, later: tuple[int, ...]) -> list[Tensor]:
    """Logits `[1 v]` after one of the texts and after each token that follows, under a run of their own."""
    with _attached(method, subject) as run:
        found, rows = _begun(subject, run, (which,))
        out = [found]
        for token in later:
            found, rows = rows.go_on(_tokens([token]))
            out.append(found)
    return out


def _compare(found: Tensor, requested: list[Tensor], what: str) -> None:
    want = torch.cat(requested)
    if not close_model(found, want):
        raise Broken(f"{what}, logits differ from the text alone by {error(found, want):.2g}")


@law("texts that are packed into one row are each what they would be alone, or such a row is refused")
@torch.no_grad()
def packed_texts(method: Method) -> None:
    if TEXT not in subjects_of(method):
        raise DoesNotApply(f"is for {', '.join(method.subjects)}, not for text")
    one, other = text()[:1], text(1)[:1, :SHORT]
    places = torch.cat([torch.arange(x.shape[1], device=place()) for x in (one, other)])[None]
    with _attached(method, TEXT) as run:
        alone = [run(input_ids=x, use_cache=False).logits for x in (one, other)]
        told = _told(run)
    with _attached(method, TEXT) as run:
        try:
            found = run(input_ids=torch.cat([one, other], 1), position_ids=places, use_cache=False).logits
        except (SiteError, StatisticError) as refused:
            if "packed" not in str(refused) and "without a map" not in str(refused):
                raise
            return
        tells = _told(run)
    if not close_model(found, want := torch.cat(alone, 1)):
        raise Broken(f"packed into one row, logits differ from each text alone by {error(found, want):.2g}")
    for name, x in told.items():
        y = tells.get(name)
        if y is None or x.shape != y.shape or not close_on_average(y.double(), x.double()):
            raise Broken(f"of texts packed into one row it tells another {name} than of each; set `one_text`")


def _told(run: Run) -> dict[str, Tensor]:
    """All that was told so far, by its name."""
    found = {f"{name}, layer {layer}": x for (_, name, layer), x in run.state.statistics.items()}
    return {f"{name}: {part}": x for name, stat in found.items() for part, x in stat.tensors().items()}


@law("beams, batches of unlike texts, and two texts in turn equal each text alone")
def each_text_alone(method: Method) -> None:
    if all(edit.reads for edit in method.edits):
        raise DoesNotApply("reads only, and so leaves every logit as it was")
    tried = [subject for subject in subjects_of(method) if subject in (TEXT, SPLIT, CROSS)]
    if not tried:
        raise DoesNotApply(f"is for {', '.join(method.subjects)}, not for text")
    for subject in tried:
        _each_alone(method, subject)


def _each_alone(method: Method, subject: Subject) -> None:
    (a, b), (c, d), (e, f) = LATER
    one, other = _alone(method, subject, 0, (a, d)), _alone(method, subject, 1, (b, c, e))
    third = _alone(method, subject, 1, (b, c, f))

    with _attached(method, subject) as run:
        found, rows = _begun(subject, run, (0, 1))
        _compare(found, [one[0], other[0]], "in a batch")
        found, rows = rows.go_on(_tokens([a], [b]))
        _compare(found, [one[1], other[1]], "in a batch, after a token")
        found, rows = rows.reordered([1, 0]).go_on(_tokens([c], [d]))
        _compare(found, [other[2], one[2]], "with its beams in another order")
        found, _ = rows.reordered([0, 0]).go_on(_tokens([e], [f]))
        _compare(found, [other[3], third[3]], "with two beams from one")

    with _attached(method, subject) as run:
        found, first = _begun(subject, run, (0,))
        _compare(found, one[:1], "in turn with another text")
        found, second = _begun(subject, run, (1,))
        _compare(found, other[:1], "in turn with another text")
        for i, (x, y) in enumerate(((a, b), (d, c)), 1):
            found, first = first.go_on(_tokens([x]))
            _compare(found, one[i : i + 1], "in turn with another text")
            found, second = second.go_on(_tokens([y]))
            _compare(found, other[i : i + 1], "in turn with another text")
