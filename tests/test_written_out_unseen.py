"""What is written into weights unseen, values that stand on the left, what is no map, and what gets no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import heedful
from heedful.conformance.tolerances import close
from heedful.core.errors import NotEntered
from heedful.core.sites import Site
from tests.test_written_out import HALVE, SAME, Attention, B, D, H, N, Net, Writes, x
from tests.test_written_out_refused import CHANGED, NO_PRODUCT, product
from tests.test_written_out_uses import LATER, less_their_highest, refused, served

__all__ = ["x"]
pytestmark = pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")


# what is written into weights unseen


def through_data(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights.data[..., 0] = 0.0
    return weights @ v, None


def in_place(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights[..., 0] = 0.0
    return weights @ v, None


def through_data_of_scores(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k) + 0.0
    weights = scores.softmax(-1)
    scores.data.zero_()
    return weights @ v, None


def through_an_output(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    torch.mul(weights.detach(), 0.5, out=weights.data)
    return weights @ v, None


def through_a_function(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    F.hardtanh(weights.view(B * H, N, N), 0.0, 0.1, inplace=True)
    return weights @ v, None


def through_numpy(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights.detach().numpy()[..., 0] = 0.0
    return weights @ v, None


def through_a_view(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights.view(B * H, N, N).mul_(0.5)
    return weights @ v, None


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("writes", "why"),
    [
        (in_place, CHANGED),
        (through_data, CHANGED),
        (through_data_of_scores, CHANGED),
        (through_an_output, CHANGED),
        (through_a_view, CHANGED),
        (through_a_function, CHANGED),
        (through_numpy, "its weights go into numpy too"),
    ],
)
def test_what_no_version_tells_is_seen(writes: Writes, why: str, inference: bool, x: Tensor) -> None:
    with torch.inference_mode(inference):
        refused(writes, x, why)


def halved_before_a_dropout(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights.view(B * H, N, N).mul_(0.5)
    return F.dropout(weights, 0.2, net.training, True) @ v, None


def halved_in_a_list_before_a_dropout(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    torch._foreach_mul_([weights], 0.5)
    return F.dropout(weights, 0.2, net.training, True) @ v, None


def dropped_in_place(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return F.dropout(product(q, k).softmax(-1), 0.0, net.training, True) @ v, None


@pytest.mark.parametrize("writes", [halved_before_a_dropout, halved_in_a_list_before_a_dropout])
def test_a_dropout_in_place_hides_no_change(writes: Writes, x: Tensor) -> None:
    with torch.no_grad():
        net = Net(dropped_in_place)
        want = net(x)
        with heedful.attach(net, SAME, inputs=x) as run:
            assert close(run(x), want)
            for layer in net.layers:
                layer.writes = writes
            with pytest.raises(NotEntered, match=f"otherwise than when heedful looked: {CHANGED}"):
                run(x)


# values on the left, and what is no map


def from_the_left(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Values `[.. d n]` times weights whose axes are swapped, as in SHViT."""
    q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
    turned = (q.transpose(-2, -1) @ k * D**-0.5).softmax(-1).transpose(-2, -1)
    return (v @ turned).transpose(-2, -1), turned


def by_order(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    turned = product(q, k).softmax(-1).permute(0, 1, 3, 2)
    return torch.matmul(v.mT, turned).mT, turned


def there_and_back(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1).mT.swapaxes(2, 3)
    return weights @ v, weights


@pytest.mark.parametrize("writes", [from_the_left, by_order, there_and_back])
def test_values_may_stand_on_the_left(writes: Writes, x: Tensor) -> None:
    served(writes, x)


def turned_before_values(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return product(q, k).softmax(-1).mT @ v, None


def by_letters_from_the_left(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.einsum("bhdk,bhkq->bhqd", v.mT, product(q, k).softmax(-1).mT), None


def heads_for_keys(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1).transpose(1, 2)
    return (weights @ v.new_ones(N, D)).transpose(1, 2), None


def heads_for_keys_by_order(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1).permute(0, 2, 1, 3)
    return (weights @ v.new_ones(N, D)).transpose(1, 2), None


@pytest.mark.parametrize(
    ("writes", "why"),
    [
        (heads_for_keys_by_order, CHANGED),
        (turned_before_values, "its weights do not stand before the values"),
        (by_letters_from_the_left, "its weights do not stand before the values"),
        (heads_for_keys, CHANGED),
    ],
)
def test_axes_that_are_swapped_otherwise_are_refused(writes: Writes, why: str, x: Tensor) -> None:
    refused(writes, x, why)


def near_ones(net: Attention, q: Tensor, v: Tensor) -> Tensor:
    kernels = net.q(q.transpose(1, 2).flatten(2)).view(B * N * H, D, 1).softmax(1)
    return (v.transpose(1, 2).reshape(B * N * H, 1, D) @ kernels).view(B, N, H, 1).transpose(1, 2)


def with_kernels(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Beside the map a convolution whose kernels are a softmax, as in ConvBERT."""
    near = near_ones(net, q, v)
    weights = product(q, k).softmax(-1)
    return weights @ v, weights, near


def test_a_softmax_beside_a_map_is_the_modules_own(x: Tensor) -> None:
    def both(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        heads, weights, near = with_kernels(net, q, k, v)
        return heads + near, weights

    def half(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        heads, weights, near = with_kernels(net, q, k, v)
        return heads * 0.5 + near, weights * 0.5

    net, other = Net(both, weights=True).eval(), Net(half, weights=True).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, HALVE, inputs=x) as run:
        assert all(close(a, b) for a, b in zip(run(x), other(x), strict=True))


def kernels_alone(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return near_ones(net, q, v).expand_as(v), None


def scaled_kernels_alone(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """What is done with a softmax before the values makes it no other thing."""
    gates = net.dropout(net.table.softmax(-1) * 0.5).expand(B, H, N, N).transpose(1, 2).transpose(1, 2)
    return gates @ v, None


def mixed_beside_a_map(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The other softmax is of what came of a product, so it is attention that nobody follows."""
    talking = torch.einsum("bhij,hg->bgij", product(q, k), torch.eye(H)).tanh().softmax(-1)
    return product(q, k).softmax(-1) @ v + talking @ v, None


def talking_beside_a_map(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Heads mix before their softmax and after it, as in CaiT, in a module that has a map too."""
    mixed = net.mix(product(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
    mixed = net.mix(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return product(q, k).softmax(-1) @ v + mixed @ v, None


@pytest.mark.parametrize("writes", [kernels_alone, scaled_kernels_alone, mixed_beside_a_map, talking_beside_a_map])
def test_a_softmax_that_may_be_a_map_is_refused(writes: Writes, x: Tensor) -> None:
    refused(writes, x, NO_PRODUCT)


def test_what_a_look_counts_is_for_reading(x: Tensor) -> None:
    """Readers see scores that lose their row's highest as they are, with what is hidden hidden."""
    seen: list[Tensor] = []
    net = Net(less_their_highest).eval()
    with heedful.attach(net, heedful.edit(Site.PATTERN, lambda p, call: seen.append(p) or p), inputs=x) as run:
        run(x)
    assert all(not bool(p[..., LATER].any()) for p in seen)


def with_a_table_like_them(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A gate that is laid out as the weights are is none of them."""
    weights = product(q, k).softmax(-1)
    gate = net.table.detach().expand_as(weights).to(weights)
    held = weights.new_zeros(1) + torch.ones_like(weights)[..., :1]
    return weights @ v + gate @ v.detach() * held, weights


def test_what_is_laid_out_as_weights_is_none_of_them(x: Tensor) -> None:
    def half(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        heads, weights = with_a_table_like_them(net, q, k, v)
        return heads - weights @ v / 2, weights / 2

    net, other = Net(with_a_table_like_them, weights=True).eval(), Net(half, weights=True).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, HALVE, inputs=x) as run:
        assert all(close(a, b) for a, b in zip(run(x), other(x), strict=True))


def weights_that_stand_still(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (product(q, k) + net.table).softmax(-1)
    return weights.detach() @ v, weights


def scores_that_stand_still(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    with torch.no_grad():
        weights = (product(q, k) + net.table).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize("writes", [weights_that_stand_still, scores_that_stand_still])
def test_what_gets_no_gradient_from_a_module_gets_none(writes: Writes, x: Tensor) -> None:
    net = Net(writes, weights=True)

    def gradients() -> dict[str, Tensor]:
        net.zero_grad()
        net(x)[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    want = gradients()
    with heedful.attach(net, SAME, inputs=x):
        found = gradients()
    assert found.keys() == want.keys()
    assert all(close(found[name], want[name]) for name in want)


def test_weights_that_are_given_beside_still_ones_are_the_runs(x: Tensor) -> None:
    net = Net(weights_that_stand_still, weights=True).eval()
    want = net(x)[1]
    same = heedful.edit(Site.PATTERN, lambda pattern, call: pattern * 0.5 if call.layer == 1 else pattern)
    with heedful.attach(net, same, inputs=x) as run:
        assert close(run(x)[1], want * 0.5)
