"""Halo attention: does one window for a block name digits better than a window around each patch?"""

from __future__ import annotations

from claims._digits import LAYERS, SIDE, accuracy
from claims.ledger import Claim, run
from heedful.authoring import Call, Mask, Site, at
from heedful.methods import HaloAttention
from heedful.methods.mechanisms.local._neighbours import narrowed

STEPS = 200
BLOCK, HALO = 2, 1


class _Centred(HaloAttention):
    """The control: of the same window, each patch sees what lies within the halo of itself, as a convolution does."""

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return narrowed(super().narrow(mask, call), call, lambda _, query, key: (key - query).abs() <= self.halo)


WAYS = {
    "block and halo": HaloAttention(BLOCK, HALO),
    "centred": _Centred(BLOCK, HALO),
    "no halo": HaloAttention(BLOCK, 0),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {f"accuracy, {name}": accuracy(what, seed, STEPS) for name, what in WAYS.items()}
    return 100 * (numbers["accuracy, block and halo"] - numbers["accuracy, centred"]), numbers


CLAIM = Claim(
    key="P182",
    method="HaloAttention",
    says="A window that a whole block shares names images better than the part of it that lies around each patch.",
    paper_number="84.9 % on ImageNet with few parameters; windows that are not centred are said to do better",
    setup=f"A {LAYERS}-layer vision transformer trained {STEPS} steps on scikit-learn's digits, moved by 0 to 2 of "
    f"{SIDE} x {SIDE} patches; blocks of {BLOCK} x {BLOCK} with a halo of {HALO} against the same with all masked that "
    f"lies more than {HALO} from the patch that looks; the same keys of offsets. Held-out accuracy. Details: no halo.",
    effect="points of accuracy above centred windows",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
