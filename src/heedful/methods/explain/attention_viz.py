"""q' = c q and k' = (k + mean(q) - mean(k)) / c: no weight changes, and what a query looks at lies close to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Description, Finding, HeadMap, head_name
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat

SCALES = tuple(2 ** (i / 4) for i in range(-16, 17))  # what is tried for c


@dataclass(frozen=True, eq=False)
class JointEmbedding:
    """Queries and keys of many texts in one space for each head, in which distance stands for weight."""

    texts: dict[int, list[Tensor]] = field(repr=False)  # layer -> queries and keys as they were, [2 h n d] a text
    shift: dict[int, Tensor] = field(repr=False)  # layer -> [h 1 d]: added to every key
    scale: dict[int, Tensor] = field(repr=False)  # layer -> [h 1 1]: c
    raw: Tensor = field(repr=False)  # [layers h]: correlation of product and distance as they were
    joint: Tensor = field(repr=False)  # [layers h]: and in the joint space

    def embed(self, layer: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[h n d]` of any text in the joint space."""
        return query * self.scale[layer], (key + self.shift[layer]) / self.scale[layer]

    def plane(self, layer: int, head: int) -> tuple[Tensor, Tensor]:
        """All queries and all keys of a head on the two axes along which they spread most, `[n 2]` each."""
        query, key = (x[head] for x in self.embed(layer, *torch.cat(self.texts[layer], 2)))
        both = torch.cat([query, key])
        axes = torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:2].mT
        return (query - both.mean(0)) @ axes, (key - both.mean(0)) @ axes

    def __str__(self) -> str:
        return (
            f"correlation of a query's product with a key and their distance: {float(self.joint.mean()):.2f} on the "
            f"mean over heads, {float(self.raw.mean()):.2f} as they were"
        )


class AttentionViz(Method):
    """Where queries and keys of a head lie, over many texts, when moved so that near ones attend to each other."""

    paper = Paper(
        "P178",
        "AttentionViz: A Global View of Transformer Attention",
        "Catherine Yeh, Yida Chen, Aoyu Wu, Cynthia Chen, Fernanda Viégas, Martin Wattenberg",
        2023,
        "2305.03210",
        "IEEE VIS 2023",
        differs=(
            "The authors' full text was not at hand: shift and scale are what the page of one of them tells. There c "
            "is one of 7 from 0.2 to 5, by the correlation of product and distance over pairs nearer than the 0.5th "
            "percentile, each weighed by the square of how much nearer. Here it is one of 33 from 1/16 to 16, by the "
            "correlation over all pairs, which a short text has too.",
            "Correlations are over pairs of one text whose key does not stand behind its query.",
            "Two principal axes in place of t-SNE and UMAP, and no interactive page.",
            "With rotary embedding queries and keys are those after the turn, so that a point is of a word at a place.",
        ),
    )
    one_text = True
    tokens: Annotated[int, Ge(3)] = 64  # of each text that are kept, its first ones

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @reads(Site.QUERY)
    def look(self, query: Tensor, call: Call) -> None:
        """Leave the queries for `gather`, which has the keys."""
        call.state.forward["query"] = query.detach()

    @reads(Site.KEY)
    def gather(self, key: Tensor, call: Call) -> Cat:
        query: Tensor = call.state.forward.pop("query")
        fresh = key.detach()[:, :, -query.shape[2] :].repeat_interleave(query.shape[1] // key.shape[1], 1)
        is_text = call.is_text.expand(len(query), -1, -1)[:, 0]
        pieces = {}
        for row, text in enumerate(is_text):
            kept = text.nonzero()[: self.tokens, 0]
            pieces[f"{call.forward:06d}.{row:04d}"] = torch.stack([x[row][:, kept] for x in (query, fresh)])
        return Cat(pieces)

    def answer(self, readings: Readings) -> JointEmbedding:
        texts = {layer: [x.double() for x in stat.value] for layer, stat in readings.items()}
        shift, scale, raw, joint = {}, {}, [], []
        for layer, pieces in texts.items():
            mean = torch.cat(pieces, 2).mean(2, keepdim=True)  # [2 h 1 d]
            shift[layer] = mean[0] - mean[1]
            raw.append(_correlation(pieces, torch.zeros_like(shift[layer]), 1.0))
            tried = torch.stack([_correlation(pieces, shift[layer], c) for c in SCALES])  # [scales h]
            lowest = tried.nan_to_num(2.0).min(0)
            scale[layer] = shift[layer].new_tensor(SCALES)[lowest.indices][:, None, None]
            joint.append(tried.gather(0, lowest.indices[None])[0])
        return JointEmbedding(texts, shift, scale, torch.stack(raw), torch.stack(joint))

    def describe(self, answer: JointEmbedding) -> Description:
        layers = list(answer.texts)
        what = "How a key's distance from a query goes with their product{}: at -1 near keys are those looked at."
        maps = tuple(
            HeadMap(key, title, what.format(where), layers, values, "score", -1, 1)
            for key, title, where, values in (
                ("joint-embedding", "Distance and product, joint", " in the joint space", answer.joint),
                ("raw-embedding", "Distance and product, raw", " as the model has them", answer.raw),
            )
        )
        place = int(answer.joint.nan_to_num(2.0).argmin())
        head = head_name(layers[place // answer.joint.shape[1]], place % answer.joint.shape[1])
        text = (
            f"Moved into one space, keys lie nearest to the queries that look at them in head {head} "
            f"(correlation {float(answer.joint.flatten()[place]):.2f}); over all heads it is "
            f"{float(answer.joint.nanmean()):.2f}, and {float(answer.raw.nanmean()):.2f} before."
        )
        return Description(maps, findings=(Finding(text, 0.2),))


def _correlation(texts: list[Tensor], shift: Tensor, scale: float) -> Tensor:
    """Of product and distance, over the pairs of all texts, for each head `[h]`."""
    found = []
    for query, key in texts:
        q, k = query * scale, (key + shift) / scale
        pairs = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        found.append(torch.stack([(q @ k.mT)[:, pairs], torch.cdist(q, k)[:, pairs]]))  # [2 h pairs]
    both = torch.cat(found, 2)
    both = both - both.mean(2, keepdim=True)
    return (both[0] * both[1]).sum(1) / (both[0].norm(dim=1) * both[1].norm(dim=1))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    with torch.no_grad(), attach(model, AttentionViz()) as run:
        for text in (
            "The sun rises in the east and sets in the west.",
            "Two cats sat on a mat, and one of them slept.",
        ):
            run(**tokenizer(text, return_tensors="pt"))
        print(run[AttentionViz()])
