"""score_j = max over the question's queries q of the number of features that fire both at q and at token j's keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import Layers, PositiveFloat, PositiveInt, RoleName, Share
from heedful.core.regions import Span
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.kit.batches import at_least_one, read
from heedful.kit.budget import Budget, room_for
from heedful.kit.rotary import turned_back
from heedful.kit.seeds import seed_of
from heedful.methods.sparse.tokens._spans import bm25, scaled, with_room, without

_PAPER = Paper(
    "P293",
    "S3-Attention: Attention-Aligned Endogenous Retrieval for Memory-Bounded Long-Context Inference",
    "Qingsen Ma, Dianyun Wang, Yaoye Wang, Lechen Ning, Sujie Zhu, Xiaohang Zhang, Jiaming Lyu, Linhao Ren, Zhenbo Xu, "
    "Zhaofeng He",
    2026,
    "2601.17702",
    differs=(
        "The authors' text was at hand in its abstract, its introduction and another's notes, and no code of theirs "
        "was found. By the notes a shared feature counts by how strongly the question fires it and how rare it is, and "
        "what BM25 finds and both ends of the text are joined to what features find. Here features are counted, as was "
        "better on prompts of ours, and BM25 has a share of the score.",
        "Settings are ours; by the notes theirs are 128 that fire of 128 for each dimension, with biases and "
        "rectified, in four layers, and chunks of 4096 tokens.",
        "Autoencoders are of keys, before the rotary embedding and all heads of a layer in a row. A query, averaged "
        "over the heads that share a key head, fires the features along which it points furthest, so that what key and "
        "query both fire adds to their product.",
        "The spans of a role say what is retrieved whole, by the best of their tokens; the authors' are made of tokens "
        "that were found.",
        "The question is what stands behind the last span, and is read alone.",
        "BM25 counts tokens and not words.",
    ),
)
Feature = tuple[int, int]  # a layer and a number


class _Projections(Method):
    """Keys and queries of some layers as they are before the rotary embedding, `[2 n g*d]` by layer."""

    layers: Layers | None

    def idle(self, call: Call) -> bool:
        return call.cross or (self.layers is not None and call.layer not in self.layers)

    @reads(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> Cat | None:
        if call.query is None or call.key is None:
            return None
        is_text = call.is_text[:, 0].expand(len(heads), -1)
        query = turned_back(call, call.query).unflatten(1, (call.key.shape[1], -1)).mean(2)
        both = (x.transpose(1, 2).flatten(2)[is_text].float() for x in (turned_back(call, call.key), query))
        return Cat.of(f"{call.forward:06d}", torch.stack(list(both)))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: torch.cat(stat.value, 1) for layer, stat in readings.items()}


class S3Attention(Tokens):
    """Keeps the spans of a prompt at whose keys the most features fire that fire at the question's queries too.

    Features are those of top-k autoencoders, one for each layer, which `heedful.fit` learns from texts. A prompt is
    read in chunks of which nothing stays but an index: at which tokens each feature fires.
    """

    paper = _PAPER
    budget: Budget = 0.25  # tokens of the spans that stay, or a share
    role: RoleName = "documents"  # the role whose spans stay or go whole
    layers: Layers | None = None  # whose keys and queries are encoded; None: all
    active: PositiveInt = 48  # features that fire at a token
    widen: PositiveInt = 4  # features for each dimension of a layer's keys
    chunk: PositiveInt = 512  # tokens that are read together
    lexical: Share = 0.0  # share of BM25 in a span's score, from 0 for features alone to 1; the paper's hybrid has both
    rate: PositiveFloat = 1e-3  # Adam's learning rate
    tokens: PositiveInt = 512  # in a step
    epochs: PositiveInt = 8  # passes over the texts
    sae: Fitted | None = None  # "encoder.LAYER" [g*d m], "decoder.LAYER" [m g*d], "center.LAYER" [2 g*d], from a fit
    seed: int | None = None  # of a fit, 0 unless given; without a fit: random features

    @classmethod
    def neutral(cls) -> S3Attention:
        return cls(budget=1.0, seed=0)

    @classmethod
    def example(cls) -> S3Attention:
        return cls(active=4, seed=0)

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        spans = prompt.spans(self.role)
        total = sum(b - a for a, b in spans)
        room = room_for(self.budget, total)
        if room >= total:
            return prompt
        question = max(b for _, b in spans), len(prompt)
        if question[0] == question[1]:
            rule = "must be a role with a question behind its last span"
            raise FieldError(self, "role", self.role, rule, "documents")
        scores = torch.zeros(len(spans))
        if self.lexical < 1:
            scores += (1 - self.lexical) * scaled(self.scores(prompt, spans, question, read))
        if self.lexical > 0:
            scores += self.lexical * scaled(bm25(prompt, spans, question))
        kept = with_room(spans, scores, room)
        return without(prompt, [span for span in spans if span not in kept])

    def scores(self, prompt: Prompt, spans: tuple[Span, ...], question: Span, read: Reader) -> Tensor:
        """How many features the keys of each span's best token share with one of the question's queries, `[spans]`."""
        index = self.index(prompt.piece(0, question[0]), read)
        shared = torch.zeros(question[1] - question[0], question[0])
        for layer, x in read(prompt.piece(*question), _Projections(self.layers)).items():
            for row, fired in zip(shared, self.fired(x, layer, 1).tolist(), strict=True):
                for number in fired:
                    row[index.get((layer, number), [])] += 1
        best = shared.amax(0)
        return torch.stack([best[a:b].max() for a, b in spans])

    def index(self, prompt: Prompt, read: Reader) -> dict[Feature, list[int]]:
        """The tokens at whose keys each feature fires, from one chunk after another."""
        found: defaultdict[Feature, list[int]] = defaultdict(list)
        for start in range(0, len(prompt), self.chunk):
            piece = prompt.piece(start, min(start + self.chunk, len(prompt)))
            for layer, x in read(piece, _Projections(self.layers)).items():
                for place, fired in enumerate(self.fired(x, layer, 0).tolist(), start):
                    for number in fired:
                        found[layer, number].append(place)
        return dict(found)

    def fired(self, x: Tensor, layer: int, kind: int) -> Tensor:
        """The numbers of the features that fire at each token's key (kind 0) or query (kind 1), `[n active]`."""
        width = x.shape[-1]
        if self.sae is None:
            maps = [*_start(width, self.widen * width, seed_of(self, "sae") + layer), torch.zeros(2, width)]
        else:
            names = (f"{name}.{layer}" for name in ("encoder", "decoder", "center"))
            maps = [self.sae[name] for name in names if name in self.sae]
            if len(maps) < 3 or maps[0].shape[0] != width:
                rule = f"was fitted to other layers or another model; layer {layer} has keys of width {width}"
                raise FieldError(self, "sae", self.sae, rule, "a fit to this model")
        directions = (maps[0], maps[1].T)[kind].to(x)
        return _strongest((x[kind] - maps[2][kind].to(x)) @ directions, self.active).indices

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> S3Attention:
        """Autoencoders of the keys of all texts, a layer at a time."""
        depth = len(context.layers)
        if self.layers is not None and max(self.layers) >= depth:
            raise FieldError(self, "layers", self.layers, f"must be below {depth}", (depth - 1,))
        found: dict[int, Tensor] = read(context, _Projections(self.layers), at_least_one(self, batches))
        fitted: dict[str, Tensor] = {}
        for layer, x in found.items():
            center = x.mean(1)
            encoder, decoder = self._learned(x[0] - center[0], layer)
            fitted |= {f"encoder.{layer}": encoder, f"decoder.{layer}": decoder, f"center.{layer}": center}
        return replace(self, sae=Fitted(fitted))

    def _learned(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The encoder `[w m]` and decoder `[m w]` that lose least of keys `[n w]` less their mean."""
        x = x / x.square().mean().sqrt().clamp(min=1e-8)
        seed = (self.seed or 0) + layer
        encoder, decoder = (p.to(x.device).requires_grad_() for p in _start(x.shape[1], self.widen * x.shape[1], seed))
        optimiser = torch.optim.Adam([encoder, decoder], lr=self.rate)
        draw = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for rows in torch.randperm(len(x), generator=draw).split(self.tokens):
                    given = x[rows.to(x.device)]
                    code = given @ encoder
                    value, place = _strongest(code, self.active)
                    kept = torch.zeros_like(code).scatter(1, place, value)
                    loss = (kept @ decoder - given).square().mean()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        return encoder, decoder


def _strongest(code: Tensor, active: int) -> Any:
    return code.topk(min(active, code.shape[-1]), -1)


def _start(width: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """An encoder `[w m]` of directions at random, and its transpose to decode with."""
    rows = torch.randn(features, width, generator=torch.Generator().manual_seed(seed))
    decoder = rows / rows.norm(dim=1, keepdim=True)
    return decoder.T.clone(), decoder


if __name__ == "__main__":
    from pydoc_data.topics import topics

    from heedful import arrange, fit, models

    model, tokenizer, _ = models.default()
    texts = [tokenizer(text[:2000], return_tensors="pt") for _, text in sorted(topics.items())[:9]]
    tokens: list[int] = []
    spans = []
    for fact in ("The lamp is green.", "The secret word is walnut.", "Trains run every hour.", "The dog sleeps."):
        piece = tokenizer(f"{fact}\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    tokens += tokenizer("Question: which word must be kept from others?").input_ids
    prompt = Prompt(tuple(tokens), {"documents": tuple(spans)})
    method = fit(S3Attention(layers=(10, 20)), model, texts)
    print(tokenizer.decode(arrange(model, prompt, method).tokens))
