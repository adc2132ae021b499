"""Two heads trained on regression in their context: do they match like with like, one by the other's contrary?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from claims.ledger import Claim, run
from claims.P008 import EVEN, NOISE, SIZE, TRIED, asked, drawn, trained, untrained
from heedful.core.entry import Layer
from heedful.core.kinds.weights import HeadWeights
from heedful.methods import HeadCircuits
from heedful.nn import Attention


@dataclass(frozen=True)
class _Of:
    """The weights of one layer, without what nothing reads: a question's empty answer, and all outputs but one."""

    layer: Attention

    @property
    def layers(self) -> tuple[Layer, ...]:
        width, heads = self.layer.embed_dim, self.layer.num_heads
        return (Layer(0, heads, heads, width // heads, width // heads, width),)

    def weights(self, _: int) -> HeadWeights:
        heads = self.layer.num_heads
        q, k, v = (getattr(self.layer, f"{name}_proj").weight.detach().unflatten(0, (heads, -1)) for name in "qkv")
        q, o = q.clone(), self.layer.out_proj.weight.detach().unflatten(1, (heads, -1)).clone()
        q[..., SIZE:], o[:-1] = 0, 0
        return HeadWeights(q, k, v, o)


def _opposite(match: Tensor) -> float:
    """How far the head that matches like with like and the one that matches contraries do so, the lesser of the two."""
    return float(torch.minimum(match.max(), -match.min()))


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    with torch.enable_grad():
        layers = {f"{n} heads": trained(None, EVEN, seed, n) for n in (1, 2)}
    problem = drawn(TRIED, EVEN, Generator().manual_seed(5000 + seed))
    found = {f"{name}: error": float((asked(x, problem) - problem[3]).square().mean()) for name, x in layers.items()}
    match = {}
    for name, layer in (("untrained", untrained(None, seed, 2)), ("trained", layers["2 heads"])):
        context = _Of(layer)
        match[name] = HeadCircuits().fit(context).of("match")  # type: ignore[arg-type]  # all of a context that it asks
        found |= {f"{name}: match of head {h}": float(x) for h, x in enumerate(match[name])}
        weights = context.weights(0)
        answers = torch.einsum("hd,hd->h", weights.o[-1], weights.v[..., -1])
        found[f"{name}: what heads leave of the answers"] = float(answers.sum().abs() / answers.abs().sum())
    return _opposite(match["trained"]) - _opposite(match["untrained"]), found


CLAIM = Claim(
    key="P112",
    method="HeadCircuits",
    says="Two softmax heads that are trained on regressions in their context come to match like with like, and like "
    "with its contrary, and what they write cancels: a gradient step without softmax's bias.",
    paper_number="shapes of matrices in figures; two heads err less than one, and more heads no less than two",
    setup=f"P008's regressions and training, {SIZE} inputs with noise of {NOISE}, softmax, two heads as wide as an "
    "example. The trace of each head's W_K' W_Q over its singular values: the lesser of the highest and minus the "
    "lowest, against the same of the untrained layer. Errors of one head and of two, and what remains of the answers "
    "that both write, stand beside.",
    effect="how far both heads match, like with like and with contraries, above untrained ones",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
