"""What the residual stream would say at each layer, and what each head and MLP says directly to the logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from heedful.core.asked import asks
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.figures import Curves, Grid, Head, HeadMap, head_name
from heedful.core.kinds.loaded import Tokenizer
from heedful.explaining.aim import require_count, spelled, strongest
from heedful.explaining.drawn import Drawn, Told
from heedful.explaining.stream import Stream, token_of
from heedful.models import Loaded


@dataclass(frozen=True, eq=False, repr=False)
class Lens(Drawn):
    """What the stream would say after each layer, were it the last: the model's own norm and unembedding of it."""

    tokens: list[str]
    logits: Tensor  # [layers n v]
    vocabulary: Any = None  # the tokenizer that knows the words

    @cached_property
    def said(self) -> Tensor:
        """The token that each position says in the end, `[n]`."""
        return self.logits[-1].argmax(-1)

    @cached_property
    def probability(self) -> Tensor:
        """That token's probability after each layer, `[layers n]`."""
        at = self.said[None, :, None].expand(len(self.logits), -1, -1)
        return self.logits.softmax(-1).gather(-1, at)[..., 0]

    @cached_property
    def rank(self) -> Tensor:
        """How many tokens are likelier after each layer, `[layers n]`."""
        at = self.said[None, :, None].expand(len(self.logits), -1, -1)
        return (self.logits > self.logits.gather(-1, at)).sum(-1)

    @cached_property
    def kl(self) -> Tensor:
        """How far what a layer says lies from what the model says, in nats, `[layers n]`."""
        end = self.logits[-1].log_softmax(-1)
        return (end.exp() * (end - self.logits.log_softmax(-1))).sum(-1)

    @asks
    def words(self, position: int = -1) -> list[str]:
        """The likeliest token after each layer."""
        n = self.logits.shape[1]
        if not -n <= position < n:
            raise FieldError("Lens.words()", "position", position, f"must be from {-n} to {n - 1}", -1)
        return spelled(self.logits[:, position].argmax(-1), self.vocabulary)

    @property
    def figure(self) -> Grid:
        best = self.logits.argmax(-1)
        what = "The likeliest next token after each layer, and the probability there of what the model says in the end."
        rows, columns = [str(i) for i in range(len(best))], [f"{i} {x}" for i, x in enumerate(self.tokens)]
        text = [spelled(row, self.vocabulary) for row in best]
        return Grid("lens", "Logit lens", what, self.probability, rows, columns, "layer", "token", "share", text=text)

    def __repr__(self) -> str:
        rows = [f"the last of {len(self.tokens)} tokens, and what it says after each layer:"]
        for layer, word in enumerate(self.words()):
            chance, rank = float(self.probability[layer, -1]), int(self.rank[layer, -1])
            rows.append(f"  {layer:>3} {word!r:<16} the answer: {chance:.1%}, rank {rank + 1}")
        return "\n".join(rows)


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogits(Told):
    """A logit, or the difference of two, as a sum: what each part adds to the stream, as the final norm scales it."""

    heads: Tensor  # [layers h]
    mlps: Tensor  # [layers]
    biases: Tensor  # [layers], of the attention's output projection
    embedding: float
    rest: float  # the biases of the final norm and of the unembedding
    total: float  # what the model says; all of the above add up to it

    @asks
    def top(self, count: int) -> tuple[Head, ...]:
        """The heads that say most, whatever their sign; none that is not there."""
        require_count("DirectLogits.top()", count)
        return strongest(self.heads, count)

    @property
    def figure(self) -> HeadMap:
        size = float(self.heads.abs().nan_to_num(0.0).max())
        what = "What each head says directly to the logits, in nats; below 0 it speaks against the answer."
        layers = range(len(self.heads))
        return HeadMap("direct", "Direct effect on the logits", what, layers, self.heads, "nats", -size, size)

    @property
    def curves(self) -> Curves:
        lines = {"all heads": self.heads.nan_to_num(0.0).sum(-1), "MLP": self.mlps}
        what = "What the heads and the MLP of each layer say directly to the logits."
        x = range(len(self.mlps))
        return Curves("direct_layers", "Direct effect by layer", what, x, lines, "layer", "nats")

    def __repr__(self) -> str:
        heads = float(self.heads.nan_to_num(0.0).sum())
        rows = [
            f"{self.total:+.2f} nats: heads {heads:+.2f}, MLPs {float(self.mlps.sum()):+.2f}, embedding "
            f"{self.embedding:+.2f}, biases {float(self.biases.sum()) + self.rest:+.2f}; the heads that say most:"
        ]
        rows += [f"  {head_name(*head):>6} {float(self.heads[head]):+.2f}" for head in self.top(10)]
        return "\n".join(rows)


@torch.no_grad()
@asks
def logit_lens(model: nn.Module | Loaded, text: Any, *, tokenizer: Tokenizer | None = None) -> Lens:
    """What each layer's stream says of the next token, `Lens`; printed or drawn with `plot()` it shows the words.

    Refused where the logits are not made of the last layer's stream by a norm and an unembedding.
    """
    found = Stream("logit_lens()", model, text, tokenizer)
    logits = torch.stack([found.says(x[0]) for x in found.leaves])
    return Lens(found.tokens, logits, found.words)


@torch.no_grad()
@asks
def direct_logits(
    model: nn.Module | Loaded,
    text: Any,
    answer: int | str | None = None,
    instead: int | str | None = None,
    *,
    position: int = -1,
    tokenizer: Tokenizer | None = None,
) -> DirectLogits:
    """Direct logit attribution: what each head and MLP adds to the logit of `answer`, less that of `instead`.

    `answer` is a token: its id, or a text that is one token; by default the likeliest. The final norm is held at the
    scale that it has on this text, so that the parts add up to the logit.
    """
    found = Stream("direct_logits()", model, text, tokenizer)
    n, size = found.logits.shape
    if not -n <= position < n:
        rule = f"must be one of the {n} tokens, from the front or back"
        raise FieldError("direct_logits()", "position", position, rule, -1)
    logits = found.logits[position]
    if found.cap is not None:
        name = type(found.model).__name__
        raise RefusedModel(f"{name} caps its logits, so they are no sum of what its parts say")
    found.require_sum()
    found.require_heads()
    right = int(logits.argmax()) if answer is None else token_of("direct_logits()", "answer", answer, found.words, size)
    vectors = [(right, 1.0)] + (
        [] if instead is None else [(token_of("direct_logits()", "instead", instead, found.words, size), -1.0)]
    )
    direction = sum(sign * found.head.weight[i].double() for i, sign in vectors)
    bias = getattr(found.head, "bias", None)
    rest = 0.0 if bias is None else sum(sign * float(bias[i]) for i, sign in vectors)
    scale, shift, centred = found.norm_at(found.leaves[-1][0, position])
    seen = direction * scale
    seen = seen - seen.mean() if centred else seen

    def told(x: Tensor) -> Tensor:
        return x.double() @ seen

    layers = range(len(found.leaves))
    heads = torch.full((len(layers), max(x.shape[1] for x in found.heads)), float("nan"), dtype=torch.float64)
    mlps, biases = torch.zeros(2, len(layers), dtype=torch.float64)
    begin = found.begins[0, position]
    before = begin
    for layer in layers:
        projection, _ = found.outputs[layer]
        each = torch.einsum("hd,ehd->he", found.heads[layer][0, :, position].double(), projection.double())
        heads[layer, : len(each)] = told(each)
        added, after = found.adds[layer][0, position], found.leaves[layer][0, position]
        biases[layer] = told(added.double() - each.sum(0))
        mlps[layer] = told(after.double() - before.double() - added.double())
        before = after
    total = float(sum(sign * float(logits[i]) for i, sign in vectors))
    return DirectLogits(heads, mlps, biases, float(told(begin)), rest + float(shift.double() @ direction), total)
