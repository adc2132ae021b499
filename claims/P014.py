"""Affine-scaled attention: does a learned scale and shift on each row of weights train better than softmax?"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from claims._tiny_lm import HeadNorm, Trained
from claims.ledger import Claim, run
from heedful.authoring import Call, Layer, Mean, Method, Site, at, reads
from heedful.methods import AffineScaledAttention

STEPS = 200


class _FirstToken(Method):
    """Which share of a row's weights, without their signs, the first token has, and what a row adds up to."""

    paper = HeadNorm.paper

    def idle(self, call: Call) -> bool:
        return torch.is_grad_enabled()  # read after training alone

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        first = (weights.abs() * (call.k_pos[..., None, :] == 0)).sum(-1) / weights.abs().sum(-1).clamp(min=1e-9)
        return Mean.of(torch.stack([first.double().sum(), weights.double().sum()]), first.numel())


class _Sink(Method):
    """The paper's baseline: a learned logit for each head that takes its share of the softmax and is dropped."""

    paper = HeadNorm.paper

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"sink": torch.zeros(layer.heads)}

    @at(Site.NORMALISE)
    def drop(self, scores: Tensor, call: Call) -> Tensor:
        sink = call.params["sink"][:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


class _ScaleAlone(AffineScaledAttention):
    """The control: the same scale without the shift."""

    paper = HeadNorm.paper

    @at(Site.PATTERN)
    def scale(self, weights: Tensor, call: Call) -> Tensor:
        return self.scales(call)[..., None] * weights


WAYS: dict[str, Method | None] = {
    "softmax": None,
    "sink": _Sink(),
    "scale alone": _ScaleAlone(),
    "affine": AffineScaledAttention(),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {}
    for name, what in WAYS.items():
        reader = _FirstToken()
        trained = Trained(reader if what is None else what | reader, seed, STEPS)
        numbers[f"loss, {name}"] = trained.loss()
        first, total = torch.stack([m.value for m in trained.run[reader].values()]).mean(0).tolist()
        middle = statistics.median(trained.norms)
        limit = middle + 6 * statistics.median(abs(x - middle) for x in trained.norms)
        numbers |= {
            f"share of the first token, {name}": first,
            f"sum of a row, {name}": total,
            f"gradient norm, spread over mean, {name}": statistics.stdev(trained.norms)
            / statistics.fmean(trained.norms),
            f"gradient norm, spikes, {name}": float(sum(x > limit for x in trained.norms)),
        }
        trained.run.close()
    return numbers["loss, softmax"] - numbers["loss, affine"], numbers


CLAIM = Claim(
    key="P014",
    method="AffineScaledAttention",
    says="Softmax with a learned scale and shift on each row trains to a lower loss than softmax, more smoothly, and "
    "looks less at the first token.",
    paper_number="distilled models of 0.5, 1 and 3 billion parameters: loss 2.82, 2.72, 2.64 against 2.82, 2.73, 2.65; "
    "spread of the first two's gradient norms over their mean 0.80 and 2.02 against 0.90 and 2.19",
    setup=f"A 2-layer byte model trained {STEPS} steps on Python's documentation with softmax, with a learned sink, "
    "with the scale alone, and with scale and shift; held-out loss. Details: the first token's share, what rows add up "
    "to, and gradient norms over all steps: spread over mean, and how many lie six median deviations above the median.",
    effect="held-out loss with softmax less that with scale and shift, nats a byte",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
