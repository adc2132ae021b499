"""Heads of a chosen rank, written out head by head and token by token, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from heedful import attach, models
from heedful.authoring import FieldError, Layer, SiteError
from heedful.conformance.tolerances import close
from heedful.methods import RankedHeads
from heedful.methods.mechanisms.score._sliced import joined
from tests.methods.sliced import E, N, agrees, masked

RANK, HEADS = 5, 3

# torch scripts its own rules when a derivative is first carried forward
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One image `[n e]`, from the formula: maps of each head stand below one another, and the outputs are added."""
    rows = []
    for i in range(N):
        total = torch.zeros(E, dtype=x.dtype)
        for h in range(HEADS):
            mine = slice(h * RANK, (h + 1) * RANK)
            scores = [(p["query"][mine] @ x[i]) @ (p["key"][mine] @ x[j]) / math.sqrt(RANK) for j in range(N)]
            weights = torch.stack(scores).softmax(0)
            gathered = sum(w * (p["value"][mine] @ x[j]) for j, w in enumerate(weights))
            total = total + p["out"][:, mine] @ gathered
        rows.append(total)
    return torch.stack(rows)


def test_the_formula_and_the_first_step() -> None:
    agrees(RankedHeads(RANK, HEADS), by_hand)


def test_no_map_is_kept_for_the_way_back() -> None:
    draw, sizes = torch.Generator().manual_seed(0), []
    x = torch.randn(1, 64, 12, generator=draw).requires_grad_()

    def keep(y: Tensor) -> Tensor:
        sizes.append(y.numel())
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        joined(x, x, x, 4, torch.randn(8, 12, generator=draw))
    assert 0 < max(sizes) < 64 * 64  # which one head's map has


def test_derivatives_are_carried_forward_and_many_images_served() -> None:
    draw = torch.Generator().manual_seed(0)
    x, way = torch.randn(2, 1, 6, 12, generator=draw, dtype=torch.float64)
    out = torch.randn(8, 12, generator=draw, dtype=torch.float64)
    near = [joined(y, y, y, 4, out) for y in (x - 1e-6 * way, x + 1e-6 * way)]
    found = jvp(lambda y: joined(y, y, y, 4, out), (x,), (way,))[1]
    assert close(found.float(), ((near[1] - near[0]) / 2e-6).float())
    many = vmap(lambda y: joined(y, y, y, 4, out))(torch.stack([x, way]))
    assert close(many, torch.stack([joined(y, y, y, 4, out) for y in (x, way)]))


def by_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What one head hands over, by plain steps."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def test_a_second_derivative_is_refused_in_words_where_the_kernel_has_none() -> None:
    """Of queries, keys and values alike; and given where torch attends by its plain steps."""
    draw, out = torch.Generator().manual_seed(0), torch.eye(6, dtype=torch.float64)
    given = [torch.randn(1, 5, 6, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def bent(heads: Tensor, one: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(heads.square().sum(), one, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), one)[0]

    for one in given:
        with pytest.raises(SiteError, match=r"no second derivative; run the model under torch\.nn\.attention\.sdpa"):
            bent(joined(*given, 1, out), one)
        with sdpa_kernel(SDPBackend.MATH):
            assert close(bent(joined(*given, 1, out), one), bent(by_steps(*given), one))


def test_the_start() -> None:
    layer = Layer(0, 4, 4, 64, 64, 256)
    method = RankedHeads(100, 3)
    first, again = method.parameters(layer), method.parameters(layer)
    shapes = dict.fromkeys(("query", "key", "value"), (300, 256)) | {"out": (256, 300)}
    assert {name: tuple(w.shape) for name, w in first.items()} == shapes
    for name, w in first.items():
        bound = 1 / math.sqrt(shapes[name][1])
        assert torch.equal(w, again[name])
        assert not torch.equal(w, method.parameters(Layer(1, 4, 4, 64, 64, 256))[name])
        assert 0.99 * bound < float(w.max()) <= bound
        assert -bound <= float(w.min()) < -0.99 * bound
    assert not torch.equal(first["query"], first["key"])


def test_rank_and_number_are_chosen_apart() -> None:
    model = models.tiny("vit")
    for method in (RankedHeads(24, 1), RankedHeads(1, 30)):
        with attach(model, method) as run, torch.no_grad():
            assert run(**models.tiny_inputs(model)).logits.isfinite().all()


def test_says_what_is_wrong() -> None:
    for bad in ({"rank": 0}, {"heads": 0}):
        with pytest.raises(FieldError, match="1 or more"):
            RankedHeads(**bad)
    assert RankedHeads(1, 1).parameters(Layer(0, 4, 4, 6, 6, 24))["out"].shape == (24, 1)
    assert RankedHeads(24, 1).parameters(Layer(0, 4, 4, 6, 6, 24))["out"].shape == (24, 24)
    with pytest.raises(FieldError, match="at most the layer's width of 24"):
        RankedHeads(25, 1).parameters(Layer(0, 4, 4, 6, 6, 24))
    with pytest.raises(SiteError, match="layer 0: attention of a chosen rank is for images"):
        RankedHeads().attend(torch.zeros(1, N, E), masked({"out": torch.eye(E)}))
