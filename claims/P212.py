"""Threshold relative attention: do longer texts cost it less, and is it the threshold, not the decay by distance?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, rms_norm

from claims._lab import SHORT, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Layer, Method, Site, at
from heedful.methods import ThresholdRelativeAttention


class _EveryKey(Method):
    """The control: the same scores and decay, where every key is there and distance counts them all."""

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return ThresholdRelativeAttention().parameters(layer)

    @at(Site.MIX, before_rotary=True)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = qkv
        scores = rms_norm(q, q.shape[-1:], eps=1e-6) @ call.spread(rms_norm(k, k.shape[-1:], eps=1e-6)).mT * call.scale
        hidden = call.hidden.view(len(q), q.shape[2], -1)  # type: ignore[union-attr]
        decay = logsigmoid(linear(hidden, call.params["weight"], call.params["bias"])).mT[..., None]
        scores = scores + decay * (call.pairs.q - call.pairs.k + 1)
        keep = call.mask.keeps(call.pairs)
        if keep is not None:
            scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        return (weights if keep is None else weights.masked_fill(~keep, 0.0)) @ call.spread(v)


WAYS = {"softmax": None, "TRA": ThresholdRelativeAttention(), "every key": _EveryKey()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", "loss at 4 x", "loss at 8 x")
    return min(found["loss at 8 x, softmax"], found["loss at 8 x, every key"]) - found["loss at 8 x, TRA"], found


CLAIM = Claim(
    key="P212",
    method="ThresholdRelativeAttention",
    says="Keys below a threshold are gone and distance counts those left, so that longer texts than in training do "
    "less harm.",
    paper_number="none given in the abstract",
    setup=f"The lab's text course, {SHORT.steps} steps on texts of {SHORT.length}, read in texts 8 times as long: with "
    "softmax and rotary embedding, with threshold and decay, and with the decay alone, every key being there. Another "
    "held-out tenth a seed.",
    effect="nats a byte at 8 times the length below the better of the two others",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
