"""HistoGraph: does a readout over what patches were in all layers name digits better than one of the last layer?"""

from __future__ import annotations

from torch import Tensor

from claims._digits import Reads
from claims._lab import DIGITS, numbers
from claims._pooled import MeanPatch
from claims.ledger import Claim, run
from heedful.authoring import Call
from heedful.methods import HistoGraph

DEPTH = DIGITS.layers


class _Last(HistoGraph):
    """The control: the same readout, which has the last layer's states in the place of all others."""

    def read_out(self, stream: Tensor, call: Call) -> Tensor:
        if call.last_layer:
            call.state.forward["states"] = dict.fromkeys(range(-1, call.depth), stream)
        return super().read_out(stream, call)


WAYS = {
    "history": Reads() | HistoGraph(),
    "last states": Reads() | _Last(),
    "mean": Reads() | MeanPatch().on(layers=DEPTH - 1),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "accuracy", "shifted", course=DIGITS)
    return 100 * (found["accuracy, history"] - max(found["accuracy, last states"], found["accuracy, mean"])), found


CLAIM = Claim(
    key="P286",
    method="HistoGraph",
    says="A readout that attends to what each node was in all layers names graphs better than one of its last state.",
    paper_number="consistently above the pooling of last layers on benchmarks of graphs (abstract, without a figure)",
    setup=f"The lab's digits, {DIGITS.steps} steps of a vision transformer of {DEPTH} layers, whose patches are the "
    "nodes and do not see the class token; what is classified is the readout, the same readout that is shown the last "
    "layer's states in place of all, or the mean of the last layer's patches. Accuracy on another held-out third a "
    "seed. Graphs, and networks deep enough to smooth them away, are not part of it. The first run, not changed after "
    "it was seen.",
    effect="points of accuracy above the better of last states and mean",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
