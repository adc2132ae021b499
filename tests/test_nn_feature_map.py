"""Feature maps of convolutional nets: gates on them are what they are on patches, and learn with the net."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, group_norm

from heedful.authoring import Call, Layer, Method, Paper, Region, Site, Statistic, Sum, at, reads
from heedful.catalogue import entries, room
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, HeedfulError, RefusedModel, SiteError
from heedful.methods import ELA, GAAM, MALA, GatedHeads, Mega, SigmoidAttention
from heedful.nn import FeatureMap
from heedful.nn.served import Served

E, ROWS, COLS = 8, 3, 5


def _map(seed: int = 0) -> Tensor:
    return torch.randn(2, E, ROWS, COLS, generator=torch.Generator().manual_seed(seed))


class Doubled(Method):
    """Twice what it is shown, at one place that an edit may act in."""

    paper = Paper("none", "a probe", "none", 2026)

    @at(Site.HIDDEN)
    def double(self, x: Tensor, call: Call) -> Tensor:
        return 2 * x


class Shifted(Method):
    """The row of each place is added to it, told by the grid."""

    paper = Doubled.paper

    @at(Site.OUTPUT)
    def shift(self, x: Tensor, call: Call) -> Tensor:
        rows, _ = call.region("patches").grid or (0, 0)
        assert rows == ROWS
        return x + (torch.arange(x.shape[1]) // COLS)[:, None]


def test_places_are_tokens_row_by_row() -> None:
    x, row = _map(), torch.arange(ROWS).view(1, 1, ROWS, 1)
    assert close(FeatureMap(E, Doubled() | Shifted())(x), 2 * x + row)


def test_a_gate_on_a_map_is_the_papers() -> None:
    """Xu and Wan's gate of rows and columns (arXiv 2403.01123) written for maps, there and back."""
    gate, x = FeatureMap(E, ELA(3, 4)), _map().requires_grad_()
    p = {name.rpartition("_")[2]: y for name, y in gate.named_parameters()}

    def along(mean: Tensor) -> Tensor:
        return group_norm(conv1d(mean, p["kernel"], padding=1, groups=E), 4, p["norm"], p["bias"]).sigmoid()

    want = x * along(x.mean(3))[..., None] * along(x.mean(2))[:, :, None]
    found = gate(x)
    assert close(found, want)
    leaves = [x, *p.values()]
    for one, other in zip(*(torch.autograd.grad((y * _map(1)).sum(), leaves) for y in (found, want)), strict=True):
        assert bool(other.any())
        assert close_model(one, other)


HEARD: list[Any] = []


class Told(Method):
    """Gives back what it finds in its call; keeps what else it is told, and adds up what it was shown."""

    paper = Doubled.paper

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        HEARD.append(layer.highest)
        return {}

    @at(Site.BLOCK)
    def give(self, x: Tensor, call: Call) -> Tensor:
        HEARD.append((call.layer, call.depth, call.name, call.scale, call.training, call.forward))
        assert call.hidden is not None
        return call.hidden

    @reads(Site.OUTPUT)
    def add(self, x: Tensor, call: Call) -> Statistic:
        return Sum.of(x.sum())


def test_a_method_is_told_what_it_is_in_a_model() -> None:
    HEARD.clear()
    gate = FeatureMap(E, Doubled() | Told() | Shifted(), layer=1, depth=3)
    gate.run.roles = {"patches": Region(((0, 2),), (1, 2))}  # of something else: the map's own grid counts
    x, row = _map(), torch.arange(ROWS).view(1, 1, ROWS, 1)
    for training in (True, False):
        assert close(gate.train(training)(x), 2 * x + row)
    scale = E**-0.5
    assert HEARD[-2:] == [(1, 3, "FeatureMap.1", scale, True, 0), (1, 3, "FeatureMap.1", scale, False, 1)]
    assert set(HEARD[:-2]) == {2}
    assert close(gate.run[Told()][1].value, 2 * (2 * x).sum())


def test_what_stands_for_a_block_and_a_gate_behind_it() -> None:
    x = _map()
    assert not close(FeatureMap(E, GAAM() | ELA(3, 4))(x), FeatureMap(E, GAAM())(x))


ACT = {
    "Activator", "AttentionInAttention", "ContextualMemoryReweaving", "DAS", "DynamicConv", "ELA", "FFNifiedAttention",
    "GAAM", "GatedNorm", "HalvedAttention", "HyperZZW", "LightConv", "NoMixing", "OptimisedAttention",
    "PolarizedSelfAttention", "SPANet", "SlotAttention",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(n for n, k in entries().items() if room(k).startswith("mechanisms/")))
def test_a_mechanism_acts_on_a_map_or_is_refused(name: str) -> None:
    made: Any = entries()[name].example()
    x = torch.randn(1, E, 4, 4, generator=torch.Generator().manual_seed(2))
    if name not in ACT:
        with pytest.raises(HeedfulError):
            FeatureMap(E, made)(x)
        return
    found = FeatureMap(E, made)(x)
    assert found.shape == x.shape
    assert bool(found.isfinite().all())
    if name != "ContextualMemoryReweaving":  # which adds what earlier layers were shown
        assert not close(found, x)


def test_a_net_learns_is_copied_saved_and_paused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, E, 3, padding=1), FeatureMap(E, ELA(3, 4)), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    images, gate = torch.randn(2, 3, 7, 6), net[1]
    net(images).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
    other = copy.deepcopy(net)
    assert other[1].run is not gate.run
    assert torch.equal(net(images), other(images))
    with torch.no_grad():
        other[1].run.parameters()[0].add_(1.0)
    assert not torch.equal(net(images), other(images))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(images), other(images))
    gate.run.pause()
    assert torch.equal(net(images), nn.Sequential(net[0], *net[2:])(images))
    gate.run.resume()
    assert gate.run.activity().layers == 1


def test_what_cannot_be() -> None:
    for method in (SigmoidAttention(), GatedHeads(), MALA()):
        with pytest.raises(FieldError, match=r"FeatureMap.*method = .*: acts inside attention, .*heedful.nn.Attention"):
            FeatureMap(E, method)
    with pytest.raises(FieldError, match=r"channels = 0: must be 1 or more"):
        FeatureMap(0, ELA(3, 4))
    with pytest.raises(FieldError, match=r"layer = -1: must be 0 or more"):
        FeatureMap(E, ELA(3, 4), layer=-1)
    with pytest.raises(FieldError, match=r"depth = 1: must be above layer 1"):
        FeatureMap(E, ELA(3, 4), layer=1, depth=1)
    unsized: Any = Served
    with pytest.raises(TypeError, match="size"):
        unsized()
    gate = FeatureMap(E, ELA(3, 4))
    for shape in ((2, E, 3), (2, E + 1, 3, 3), (0, E, 3, 3)):
        with pytest.raises(FieldError, match=re.escape(f"x = {shape}: must be of ('b', 8, 'rows', 'cols')")):
            gate(torch.zeros(shape))
    with pytest.raises(SiteError, match="causal"):
        FeatureMap(E, Mega.example())(_map())
    assert repr(gate) == f"FeatureMap(8, {gate.method!r})"
    replica = copy.copy(gate)
    replica.__dict__["run"] = gate.run
    with pytest.raises(RefusedModel, match="in a replica"):
        replica(_map())
