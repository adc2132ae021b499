"""Where in a text and in a model an answer comes from: one place of one run at a time put into another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.figures import Grid, Head, HeadMap, head_name
from heedful.core.fitted import Fitted
from heedful.core.kinds.loaded import Tokenizer
from heedful.core.method import Method, Part
from heedful.core.sites import Site, at
from heedful.explaining.aim import pairs, strongest
from heedful.explaining.attention_patterns import patterns
from heedful.explaining.drawn import Told
from heedful.explaining.stream import Stream, token_of
from heedful.models import Loaded

What = Literal["residual", "attention", "mlp", "heads", "pattern"]
WHAT: dict[str, str] = {
    "residual": "the stream after a layer",
    "attention": "what a layer's attention adds to the stream",
    "mlp": "what a layer's MLP adds to the stream",
    "heads": "what a head hands over",
    "pattern": "where a head looks",
}
ROWS = 64  # texts in one forward


class _Put(Method, abstract=True):
    """Puts another run's values into some places of each text of a batch."""

    values: Fitted  # <layer> [b|1 h|1 n ...]; of the batch's text
    places: Fitted  # here [b h|1 n]: in which text, head and token


class _Stream(_Put):
    @at(Site.RESIDUAL)
    def put(self, x: Tensor, call: Call) -> Tensor:
        return self.values[str(call.layer)].to(x).expand_as(x).where(self.places["here"][:, 0, :, None], x)


class _Added(_Put):
    """Moves the stream by how far another run's MLP would."""

    @at(Site.RESIDUAL)
    def put(self, x: Tensor, call: Call) -> Tensor:
        return x + self.values[str(call.layer)].to(x) * self.places["here"][:, 0, :, None]


class _Output(_Put):
    @at(Site.OUTPUT)
    def put(self, x: Tensor, call: Call) -> Tensor:
        return self.values[str(call.layer)].to(x).expand_as(x).where(self.places["here"][:, 0, :, None], x)


class _Heads(_Put):
    @at(Site.HEAD_OUTPUT)
    def put(self, x: Tensor, call: Call) -> Tensor:
        return self.values[str(call.layer)].to(x).expand_as(x).where(self.places["here"][..., None], x)


class _Pattern(_Put):
    @at(Site.PATTERN)
    def put(self, x: Tensor, call: Call) -> Tensor:
        rows = torch.arange(self.places["here"].shape[-1], device=x.device)[call.rows]
        mine = self.values[str(call.layer)].to(x)[:, :, rows][..., call.keys.index[0, 0]]
        return mine.expand_as(x).where(self.places["here"][:, :, rows, None], x)


KINDS: dict[str, type[_Put]] = {
    "residual": _Stream, "attention": _Output, "mlp": _Added, "heads": _Heads, "pattern": _Pattern,
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Trace(Told):
    """How much of the difference between two texts each place alone brings back."""

    share: Tensor  # [layers n], [layers h], or [heads n] where heads were named; 1 is all of the difference
    what: str
    tokens: list[str]  # of the corrupt text
    heads: tuple[Head, ...] | None  # the rows, where heads were named
    clean: float  # the answer's logit on the clean text, less the other's
    corrupt: float

    @property
    def figure(self) -> Grid | HeadMap:
        title = f"Patching {WHAT[self.what]}"
        what = "The share of the clean text's lead that this place alone brings back; below 0 it works against it."
        key = f"trace_{self.what}"
        if self.what in ("heads", "pattern") and self.heads is None:
            size = float(self.share.abs().nan_to_num(0.0).max())
            return HeadMap(key, title, what, range(len(self.share)), self.share, "share", -size, size)
        rows = [head_name(*head) for head in self.heads] if self.heads else [str(i) for i in range(len(self.share))]
        columns = [f"{i} {word}" for i, word in enumerate(self.tokens)]
        label = "head" if self.heads else "layer"
        return Grid(key, title, what, self.share, rows, columns, label, "token", "share")

    def top(self, count: int) -> tuple[tuple[int, int], ...]:
        """The places with the largest effects, as row and column of `share`; none that is not there."""
        return strongest(self.share, count)

    def __repr__(self) -> str:
        figure = self.figure
        rows = [f"{WHAT[self.what]}: clean {self.clean:+.2f}, corrupt {self.corrupt:+.2f} nats; what brings most back:"]
        for i, j in self.top(8):
            place = head_name(i, j) if isinstance(figure, HeadMap) else f"{figure.row_label} {figure.rows[i]}"
            token = "" if isinstance(figure, HeadMap) else f" at {figure.columns[j]!r}"
            rows.append(f"  {float(self.share[i, j]):+7.1%}  {place}{token}")
        return "\n".join(rows)


@torch.no_grad()
@asks
def trace(
    model: nn.Module | Loaded,
    clean: Any,
    corrupt: Any,
    answer: int | str | None = None,
    instead: int | str | None = None,
    *,
    what: What = "residual",
    heads: Iterable[Head] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Trace:
    """Activation patching of two texts of equally many tokens: the corrupt one is read with one place of the clean run.

    `what` is the stream after each layer ("residual"), what attention or the MLP of each layer adds to it, for each
    token; or what each head hands over ("heads") or where it looks ("pattern"), for all tokens at once, or token by
    token for the `heads` that are named. A share is how far that brings the logit of `answer` (the clean text's
    likeliest token), less that of `instead`, back to the clean text's, at the last token.
    """
    if what not in WHAT:
        raise FieldError("trace()", "what", what, f"must be one of {', '.join(map(repr, WHAT))}", "residual")
    if heads is not None and what not in ("heads", "pattern"):
        raise FieldError("trace()", "heads", heads, f"are not what {what!r} is about", "what='heads'")
    right, wrong = (Stream("trace()", model, text, tokenizer) for text in (clean, corrupt))
    if right.ids.shape != wrong.ids.shape:
        rule = f"must have as many tokens as the clean text, {len(right.ids)}"
        raise FieldError("trace()", "corrupt", f"{len(wrong.ids)} tokens", rule, "a text with one word exchanged")
    lead = _lead(right, answer, instead)
    high, low = float(lead(right.logits)), float(lead(wrong.logits))
    if high == low:
        rule = f"must say the answer more or less than the clean one; its lead is {low:.3g} in both"
        raise FieldError("trace()", "corrupt", corrupt, rule, "a text with one word exchanged")
    values = _values(right, wrong, what)
    counts = {layer: right.heads[layer].shape[1] for layer in range(len(right.heads))}
    named = None if heads is None else tuple((n, h) for n, mine in pairs("trace()", heads).items() for h in mine)
    if named is not None and not all(0 <= h < counts.get(n, 0) for n, h in named):
        raise FieldError("trace()", "heads", named, f"must be of the model's {len(counts)} layers", (0, 0))

    def tried(layer: int, places: Tensor) -> Tensor:
        return _tried(wrong, KINDS[what], values, layer, places, lead)

    n = len(wrong.ids)
    streams = zip([right.begins, *right.leaves], [wrong.begins, *wrong.leaves], strict=True)
    moved = torch.stack([(x != y)[0].any(-1) for x, y in streams]).any(0).cpu()  # nothing to bring back elsewhere

    def by_token(layer: int, places: Tensor) -> Tensor:
        found = torch.full((n,), low, dtype=torch.float64)
        found[moved] = tried(layer, places[moved])
        return found

    each = torch.eye(n, dtype=torch.bool)[:, None]  # [b 1 n]: a text for each token
    if named is not None:
        rows = []
        for layer, head in named:
            mine = torch.zeros(n, counts[layer], n, dtype=torch.bool)
            mine[:, head] = each[:, 0]
            rows.append(by_token(layer, mine))
    elif what in ("heads", "pattern"):
        every = ((layer, torch.eye(h, dtype=torch.bool)[..., None].expand(-1, -1, n)) for layer, h in counts.items())
        found = [tried(layer, places) for layer, places in every]
        rows = [nn.functional.pad(x, (0, max(counts.values()) - len(x)), value=float("nan")) for x in found]
    else:
        rows = [by_token(layer, each) for layer in counts]
    share = (torch.stack(rows) - low) / (high - low)
    return Trace(share, what, wrong.tokens, named, high, low)


def _lead(clean: Stream, answer: int | str | None, instead: int | str | None) -> Callable[[Tensor], Tensor]:
    """What makes of logits `[... n v]` that of the answer at the last token, less that of what might stand instead."""
    size = clean.logits.shape[-1]
    likeliest = int(clean.logits[-1].argmax())
    chosen = likeliest if answer is None else token_of("trace()", "answer", answer, clean.words, size)
    other = None if instead is None else token_of("trace()", "instead", instead, clean.words, size)
    if other == chosen:
        rule = f"begins with token {other}, as the answer does; nothing leads over itself"
        raise FieldError("trace()", "instead", instead, rule, "what the model might say in its place")

    def lead(logits: Tensor) -> Tensor:
        last = logits[..., -1, :].double()
        return last[..., chosen] - (0 if other is None else last[..., other])

    return lead


def _values(right: Stream, wrong: Stream, what: str) -> Fitted:
    """What is put in, by layer, with a first axis for texts."""
    if what == "pattern":
        maps = patterns(right.model, right.ids).maps
        return Fitted({str(layer): x[None] for layer, x in maps.items()})
    if what == "mlp":
        right.require_sum()
        moved = zip(right.mlps(), wrong.mlps(), strict=True)
        return Fitted({str(layer): good - bad for layer, (good, bad) in enumerate(moved)})
    held: Mapping[str, list[Tensor]] = {"residual": right.leaves, "attention": right.adds, "heads": right.heads}
    return Fitted({str(layer): x for layer, x in enumerate(held[what])})


def _tried(
    wrong: Stream, kind: type[_Put], values: Fitted, layer: int, places: Tensor, lead: Callable[[Tensor], Tensor]
) -> Tensor:
    """The lead of the corrupt text with the values in each of these places `[b h|1 n]`."""
    some = Fitted({str(layer): values[str(layer)]})

    def found() -> Iterator[Tensor]:
        for part in places.split(ROWS):
            put: Part = kind(some, Fitted({"here": part.contiguous().to(wrong.ids.device)})).on(layer)
            with warnings.catch_warnings(), still(wrong.model), attach(wrong.model, put) as run:
                warnings.simplefilter("ignore", InactiveWarning)  # the texts may be alike in all of these places
                yield lead(run(input_ids=wrong.ids.expand(len(part), -1)).logits)

    return torch.cat(list(found())).cpu()
