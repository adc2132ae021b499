"""tr(M) / |M|_1 of M = W_K' W_Q and of M = W_O W_V, head by head: does a head match like with like, and copy it?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from heedful.core.entry import FitContext
from heedful.core.figures import Curves, Description, Finding, HeadMap, head_name
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights, Weights
from heedful.core.paper import Paper


class HeadCircuits(Weights):
    """How near each head's two circuits are to a multiple of the identity, from the weights alone.

    1 says that a head looks for tokens like its own, or writes what it reads; -1 the contrary; maps at random are
    near 0. `heedful.fit(HeadCircuits(), model, ())` finds it.
    """

    paper = Paper(
        "P112",
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head "
        "Softmax Attention",
        "Jianliang He, Xintian Pan, Siyu Chen, Zhuoran Yang",
        2025,
        "2503.12734",
        "ICML 2025",
        differs=(
            "The authors look at matrices of one small layer and name their shapes; here each is one number, the trace "
            "over the sum of singular values, which heads of any model have.",
            "With rotary embedding a query and a key meet as if they stood at one place, and norms' scales and biases "
            "are left out.",
        ),
    )
    # what is fitted, over all heads in a row: "heads" [n 2] (layer and head), "match" and "copy" [n]; by layer "left"

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> Self:
        heads, match, copy, left = [], [], [], []
        for n, layer in enumerate(context.layers):
            weights = context.weights(layer.number)
            keys, values = (_each(weights, x).double() for x in (weights.k, weights.v))
            queries, outputs = weights.q.double(), weights.o.double().permute(1, 2, 0)  # all [h d e]
            heads += [(n, h) for h in range(weights.heads)]
            match.append(sameness(keys, queries))
            copy.append(sameness(outputs, values))
            written = torch.einsum("hde,hdi->hei", outputs, values)
            left.append(written.sum(0).norm() / written.flatten(1).norm(dim=1).sum())
        found = {"match": torch.cat(match), "copy": torch.cat(copy), "left": torch.stack(left)}
        return replace(
            self, fitted=Fitted({"heads": torch.tensor(heads)} | {k: x.float().cpu() for k, x in found.items()})
        )

    def of(self, part: str) -> Tensor:
        """What was found: "match" or "copy" of all heads in a row, "heads", or "left" of each layer."""
        return self.found[part]

    def describe(self) -> Description:
        heads = self.of("heads")
        layers, most = int(heads[:, 0].max()) + 1, int(heads[:, 1].max()) + 1
        shown = {
            "match": ("Like looks for like", "What queries ask of keys, as a map of the stream: 1 where it is a "
                      "multiple of the identity, -1 where it is one of its contrary, near 0 for a map at random."),
            "copy": ("Written as read", "The same of what a head writes of what it reads."),
        }  # fmt: skip
        maps = []
        for part, (title, what) in shown.items():
            values = torch.full((layers, most), float("nan"))
            values[heads[:, 0], heads[:, 1]] = self.of(part)
            maps.append(HeadMap(f"circuits-{part}", title, what, range(layers), values, "trace over singular values"))
        what = "The size of what all heads of a layer write together over that of what each writes: 0 if they cancel."
        lines = {"all heads": self.of("left")}
        curve = Curves("circuits-left", "What heads leave of one another", what, range(layers), lines, "layer", "share")
        top = int(self.of("copy").abs().argmax())
        value, told = float(self.of("copy")[top]), head_name(*(int(x) for x in heads[top]))
        verb = "copies what it reads" if value > 0 else "writes the contrary of what it reads"
        text = f"By its weights head {told} {verb} most plainly ({value:+.2f} of at most 1)."
        return Description((*maps, curve), findings=(Finding(text, 0.2),))


def _each(weights: HeadWeights, x: Tensor) -> Tensor:
    """What key heads hold `[g d e]`, for each query head that reads it."""
    return x.repeat_interleave(weights.heads // weights.kv_heads, 0)


def sameness(a: Tensor, b: Tensor) -> Tensor:
    """tr(A' B) over the sum of its singular values, for each head of two `[h d e]`; 0 where there is nothing."""
    trace = (a * b).sum((1, 2))
    (_, left), (_, right) = (
        torch.linalg.qr(x.mT) for x in (a, b)
    )  # A' B has the singular values of this small product
    total = torch.linalg.svdvals(left @ right.mT).sum(-1)
    return torch.where(total > 0, trace / total, 0.0)


if __name__ == "__main__":
    import heedful

    model, _, _ = heedful.models.default()
    print(heedful.fit(HeadCircuits(), model, ()).describe().findings[0].text)
