"""logits_h = L_h head_h + b_h, fitted so that softmax(sum_h logits_h) is near what the model says in the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveFloat, PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.kit.batches import at_least_one
from heedful.kit.seeds import seed_of

RANDOM_WORDS = 50  # tokens that a lens of a seed alone knows


@dataclass(frozen=True, eq=False)
class Said:
    """What the heads of one layer say of the tokens of one forward, best first; rows stand as tokens were fed."""

    tokens: Tensor  # [b h n most] ids
    logits: Tensor  # [b h n most]


class AttentionLens(Method):
    """The tokens that each head of one layer speaks for, through an affine map of its own: a `Said` for every forward.

    `heedful.fit(AttentionLens(layer), model, batches)` learns the maps from texts. They are as large as the vocabulary
    for every dimension of a head: 28 million numbers a layer of SmolLM2-135M.
    """

    paper = Paper(
        "P205",
        "Attention Lens: A Tool for Mechanistically Interpreting the Attention Head Information Retrieval Mechanism",
        "Mansi Sakarvadia, Arham Khan, Aswathy Ajith, Daniel Grzenda, Nathaniel Hudson, André Bauer, Kyle Chard, "
        "Ian Foster",
        2023,
        "2310.16270",
        differs=(
            "A lens takes a head's own numbers, before its part of the output projection: the same maps of what the "
            "head writes with a fraction of the numbers, though Adam's steps differ.",
            "All tokens of a text count; the authors' code takes each text's last.",
            "Each batch makes a step; the authors' code adds up the gradients of ten and stops early.",
            "Lenses begin as the unembedding and no bias; the authors' code begins with a matrix and a bias from files "
            "that do not come with it.",
        ),
    )
    one_text = True
    chunk_invariant = False  # a text in pieces has a Said a piece
    layer: NonNegativeInt = 0  # the layer whose heads are looked at
    most: PositiveInt = 10  # tokens to tell of each head and place
    rate: PositiveFloat = 1e-3  # Adam's learning rate; the authors' code: 1e-3, and 1e-4 from its command line
    epochs: PositiveInt = 1  # passes over the batches; the authors' code: 1
    lens: Fitted | None = None  # "weight" [h v d] and "bias" [h v], from a fit
    seed: int | None = None  # without a fit: random lenses of a small vocabulary

    @classmethod
    def example(cls) -> AttentionLens:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return call.layer != self.layer

    @reads(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> Statistic:
        logits = self.through(heads.detach())
        high, at = logits.topk(min(self.most, logits.shape[-1]), -1)
        return Cat({f"{call.forward:06d}.logits": high, f"{call.forward:06d}.tokens": at})

    def through(self, heads: Tensor) -> Tensor:
        """What the lenses make of all heads `[b h n d]`: logits `[b h n v]`."""
        h, d = heads.shape[1], heads.shape[3]
        if self.lens is not None:
            weight, bias = (self.lens[name].to(heads) for name in ("weight", "bias"))
        else:
            draw = torch.Generator().manual_seed(seed_of(self, "lens"))
            weight = torch.randn(h, RANDOM_WORDS, d, generator=draw).to(heads)
            bias = weight.new_zeros(h, RANDOM_WORDS)
        if (len(weight), weight.shape[2]) != (h, d):
            rule = f"must be fitted to all heads of the layer, {h} of width {d} here, without .on(heads=...)"
            raise FieldError(self, "lens", self.lens, rule, "a fit to this model")
        return torch.einsum("bhnd,hvd->bhnv", heads, weight) + bias[:, None]

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> AttentionLens:
        """Lenses that begin as the unembedding and learn from the model's inputs in `batches`, a step for each."""
        found = list(at_least_one(self, batches))
        if self.layer >= len(context.layers):
            raise FieldError(self, "layer", self.layer, f"must be below {len(context.layers)}", len(context.layers) - 1)
        o, table = context.weights(self.layer).o.float(), context.vocabulary().unembedding.float()
        weight = torch.einsum("ve,ehd->hvd", table, o).requires_grad_()
        bias = torch.zeros(weight.shape[:2], device=weight.device, requires_grad=True)
        optimiser = torch.optim.Adam([weight, bias], lr=self.rate)
        part = _Kept().on(layers=self.layer)
        with context.attach(part) as run:
            for batch in self.epochs * found:
                with torch.no_grad():
                    final = run(**batch).logits.float()
                    heads, is_text = run[part]
                    run.reset()
                said = torch.einsum("bhnd,hvd->bnv", heads.float(), weight) + bias.sum(0)
                loss = kl_div(
                    said[is_text].log_softmax(-1), final[is_text].log_softmax(-1), reduction="batchmean",
                    log_target=True,
                )  # fmt: skip
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return replace(self, lens=Fitted({"weight": weight, "bias": bias}))

    def answer(self, readings: Readings) -> list[Said]:
        """One for each forward, in their order."""
        pieces = [x for stat in readings.values() for x in stat.value]  # logits stand before tokens
        return [Said(tokens, logits) for logits, tokens in zip(pieces[::2], pieces[1::2], strict=True)]


class _Kept(Method):
    """Heads `[b h n d]` of one layer and one forward, and which of them are no padding `[b n]`."""

    @reads(Site.HEAD_OUTPUT)
    def keep(self, heads: Tensor, call: Call) -> Statistic:
        return Cat({"heads": heads, "is_text": call.is_text[:, 0].expand(len(heads), -1)})

    def answer(self, readings: Readings) -> list[Tensor]:
        return next(iter(readings.values())).value


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    texts = ["Rome is the capital of Italy.", "Water freezes at zero degrees.", "The cat sat on the mat."]
    lens = fit(AttentionLens(20, most=4, epochs=2), model, [tokenizer(text, return_tensors="pt") for text in texts])
    with torch.no_grad(), attach(model, lens) as run:
        run(**tokenizer("Paris is the capital of", return_tensors="pt"))
    for head, tokens in enumerate(run[lens][0].tokens[0, :, -1].tolist()):
        print(f"head {head}: {[tokenizer.decode(token) for token in tokens]}")
