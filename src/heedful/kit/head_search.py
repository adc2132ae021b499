"""How well a model answers under a method: what a search over heads goes by; and the heads that it chose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from annotated_types import doc
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Session
from heedful.core.errors import FieldError
from heedful.core.method import Part, Stack
from heedful.core.ranges import NonNegativeInt
from heedful.kit.batches import Batch

Head = Annotated[tuple[NonNegativeInt, NonNegativeInt], doc("must be a pair of layer and head")]


def heads_here(owner: object, heads: Sequence[Head], call: Call, field: str = "heads") -> list[int]:
    """Which heads of the call's layer are among those that were chosen; refuses any that the model lacks."""
    mine = [head for layer, head in heads if layer == call.layer]
    if max(mine, default=0) >= call.heads or max((layer for layer, _ in heads), default=0) >= call.depth:
        rule = f"fitted to another model; here are {call.depth} layers, and {call.heads} heads in layer {call.layer}"
        raise FieldError(owner, field, heads, rule, f"heedful.fit({type(owner).__name__}(), model, batches)")
    return mine


@torch.no_grad()
def scores(context: FitContext, what: Part | Stack, batches: Sequence[Batch]) -> Tensor:
    """Each text's score, `[texts]`; the run's roles are the batch's "roles".

    With "options" `[b c]`, first tokens of answers with the right one first: its log-probability among them, after the
    text. With "target" `[b]`: the log-probability of that token. With neither: the mean log-probability of the text's
    own tokens.
    """
    with context.attach(what) as run:
        return torch.cat([_score(run, batch) for batch in batches])


def _score(run: Session, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k not in ("options", "target", "roles")}
    run.roles = batch.get("roles")
    logits = run(**inputs).logits.float()
    if "options" in batch or "target" in batch:
        ends = at_end(logits, inputs)
        if "options" in batch:
            return ends.gather(-1, batch["options"]).log_softmax(-1)[:, 0]
        return ends.log_softmax(-1).gather(-1, batch["target"][:, None])[:, 0]
    return of_text(logits, inputs)


def of_text(logits: Tensor, inputs: Batch) -> Tensor:
    """The mean log-probability of each text's own tokens by logits `[b n v]`, `[b]`."""
    own = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    text = inputs.get("attention_mask", torch.ones(logits.shape[:2], device=logits.device)).bool()
    real = text[:, 1:] & text[:, :-1]
    return own.masked_fill(~real, 0.0).sum(-1) / real.sum(-1).clamp(min=1)


def at_end(logits: Tensor, inputs: Batch) -> Tensor:
    """What logits `[b n v]` say after each text's last token, `[b v]`."""
    text = inputs.get("attention_mask", torch.ones(logits.shape[:2], device=logits.device))
    last = text.shape[1] - 1 - text.flip(-1).int().argmax(-1)
    return logits[torch.arange(len(logits), device=logits.device), last]


def gains(context: FitContext, method: Part, heads: Iterable[Head], batches: Sequence[Batch]) -> dict[Head, float]:
    """How much the mean score rises when the method acts in one head alone, for each head."""
    base = scores(context, Stack(), batches).mean()
    return {(n, h): float(scores(context, method.on(n, h), batches).mean() - base) for n, h in heads}
