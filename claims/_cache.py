"""What the claims about shortened caches share: a text is read, its cache cut, and more text read with what is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import apart, passages
from heedful import attach
from heedful.adapters.kvcache import cache_bytes
from heedful.core.call import CachedKV, Call
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, newest, room
from heedful.methods.sparse.prefill.sink_window import SinkWindow

Source = Callable[[int, int, int], list[str]]  # a seed's texts: how many, of how many words
LESSONS: Source = partial(apart, fitting=True)
TOWNS = ("Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Madrid", "Athens", "Vienna", "Prague", "Tokyo", "Ottawa", "Rome")


class Newest(Method):
    """The baseline: a few first entries and the newest ones stay, while the text is read in full."""

    paper = SinkWindow.paper
    chunk_invariant = False
    budget: Budget = 64
    sinks: int = 4

    @at(Site.CACHE)
    def forget(self, entries: CachedKV, call: Call) -> Tensor:
        last = newest(entries, call, room(self.budget, call) - self.sinks)
        return entries.is_filled & (last | (entries.positions.position < self.sinks))


class Reading(NamedTuple):
    """A text to compress, the text that follows, and which of its tokens count, `[1 n]` each."""

    context: Tensor
    rest: Tensor
    counts: Tensor


def prose(seed: int, tokens: int, rest: int, source: Source = passages) -> Reading:
    """Prose cut in two; all of the second part counts."""
    text = " ".join(" ".join(passage.split()[:150]) for passage in source(seed, 6, 150))
    ids = default().tokenizer(text, return_tensors="pt").input_ids[:, : tokens + rest]
    return Reading(ids[:, :tokens], ids[:, tokens:], torch.ones(1, rest, dtype=torch.bool))


def recall(seed: int, words: int = 230, facts: int = 6, source: Source = passages) -> Reading:
    """Numbers of towns strewn over prose, then asked for in another order; the digits count."""
    draw, tokenizer = random.Random(seed), default().tokenizer
    numbers = {town: f"{draw.randrange(10**4):04d}" for town in draw.sample(TOWNS, facts)}
    filler = " ".join(source(seed, 4, words))[: 6 * words].split()
    size = len(filler) // facts
    pieces = []
    for i, (town, number) in enumerate(numbers.items()):
        pieces += [f"The number of {town} is {number}.", " ".join(filler[i * size : (i + 1) * size])]
    context = tokenizer(" ".join(pieces) + "\n\n", return_tensors="pt").input_ids
    rest: list[int] = []
    counts: list[bool] = []
    for town in draw.sample(sorted(numbers), facts):
        for part, asked in ((f"The number of {town} is", False), (f" {numbers[town]}", True), (".\n", False)):
            ids = tokenizer(part, add_special_tokens=False).input_ids
            rest += ids
            # the blank before the digits is no part of the answer
            counts += [asked and tokenizer.decode([token]).strip().isdigit() for token in ids]
    return Reading(context, torch.tensor([rest]), torch.tensor([counts]))


def questions(seed: int, most: int = 3, words: int = 230) -> list[Reading]:
    """The same facts in prompts that end with a question, `most` of them, and the digits of the answer."""
    text = recall(seed, words)
    counts = text.counts[0].tolist()
    starts = [i for i, counted in enumerate(counts) if counted and not counts[i - 1]]
    found = []
    for start in starts[:most]:
        begin = max((i + 1 for i in range(start - 1) if counts[i]), default=0)
        stop = next((i for i in range(start, len(counts)) if not counts[i]), len(counts))
        prompt = torch.cat([text.context, text.rest[:, begin:start]], 1)
        found.append(Reading(prompt, text.rest[:, start:stop], text.counts[:, start:stop]))
    return found


@torch.no_grad()
def memory(text: Reading, what: Method | Stack) -> float:
    """The memory of the context's cache under the method, as a share of what it takes as it comes."""
    model = default().model
    whole = cache_bytes(model(input_ids=text.context, use_cache=True, logits_to_keep=1).past_key_values)
    with attach(model, what) as run:
        return cache_bytes(run(input_ids=text.context, use_cache=True, logits_to_keep=1).past_key_values) / whole


@torch.no_grad()
def losses(text: Reading, what: Method | Stack | None) -> float:
    """Mean loss, in nats, of the tokens that count, the context's cache having gone through the method."""
    model = default().model
    with attach(model, Stack() if what is None else what) as run:
        read = run(input_ids=text.context, use_cache=True, logits_to_keep=1)
        more = run(input_ids=text.rest, past_key_values=read.past_key_values, use_cache=True)
    logits = torch.cat([read.logits, more.logits[:, :-1]], 1)
    found = torch.nn.functional.cross_entropy(logits[0], text.rest[0], reduction="none")
    return float(found[text.counts[0]].mean())
