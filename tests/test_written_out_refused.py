"""What written-out attention does that an edit of it would not reach: it is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful.core.errors import NotEntered, RefusedModel
from tests.test_written_out import HALVE, Attention, B, D, H, N, Net, Writes, plain, x

__all__ = ["x"]


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / D**0.5


def emptied_in_place(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights[..., 0] = 0.0
    return weights @ v, weights


def halved_through_a_view(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights.view(B * H, N, N).mul_(0.5)
    return weights @ v, weights


def halved_and_viewed(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    weights.view(B * H, N, N).mul_(0.5)
    weights = weights.unsqueeze(0).squeeze(0)
    return weights @ v, weights


def scores_gone_before_a_dropout(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k) + 0.0
    weights = scores.softmax(-1)
    scores.zero_()
    weights = net.dropout(weights)
    return weights @ v, weights


def scores_gone(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k) + 0.0
    weights = scores.softmax(-1)
    scores.zero_()
    return weights @ v, weights


def queries_gone(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    asks = q.clone()
    weights = product(asks, k).softmax(-1)
    asks.zero_()
    return weights @ v, weights


def keys_gone(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    held = k.clone()
    weights = product(q, held).softmax(-1)
    held[..., 0, :] = 0.0
    return weights @ v, weights


def gated_by_squares(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    return weights @ v * (weights**2).sum(-1, keepdim=True), None


def gated_by_the_largest(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    return weights @ v * weights.max(-1, keepdim=True).values, None


def kept_elsewhere(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights, held = product(q, k).softmax(-1), torch.zeros(B, H, N, N)
    held[:] = weights
    return weights @ v * held[..., :1], None


def in_two_steps(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    return (weights @ weights) @ v, None


def with_what_was(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights, rows = product(q, k).softmax(-1).view(B * H, N, N), v.reshape(B * H, N, D)
    return torch.baddbmm(rows, weights, rows).view(B, H, N, D), None


def over_all_pairs(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).flatten(2).softmax(-1).view(B, H, N, N)
    return weights @ v, weights


def capped_in_place(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).tanh_().softmax(-1)
    return weights @ v, weights


def clamped(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).clamp(-0.1, 0.1).softmax(-1)
    return weights @ v, weights


def from_below(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    weights = torch.maximum(scores, torch.zeros_like(scores)).softmax(-1)
    return weights @ v, weights


def of_the_first_text(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q[:1], k[:1]).softmax(-1)
    return weights @ v, weights


def heads_among_rows(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """One key head, as StarCoder's first form has it."""
    weights = product(q.reshape(B, H * N, D), k[:, 0]).softmax(-1)
    return (weights @ v[:, 0]).view(B, H, N, D), None


def heads_among_rows_of_scores(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The same, with axes of their own for heads of weights."""
    weights = product(q.reshape(B, H * N, D), k[:, 0]).softmax(-1).view(B, H, N, N)
    return weights @ v[:, :1], None


def taken_from_a_table(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (net.table - product(q, k)).softmax(-1)
    return weights @ v, weights


def divides_a_table(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = torch.div(torch.tensor(2.0), product(q, k)).softmax(-1)
    return weights @ v, weights


def times_a_table(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (product(q, k) * torch.arange(N)).softmax(-1)
    return weights @ v, weights


CHANGED = "its weights are changed after a softmax"
NO_PRODUCT = "a softmax of what is no product of queries and keys alone"


@pytest.mark.parametrize(
    ("writes", "why"),
    [
        (emptied_in_place, CHANGED),
        (halved_through_a_view, CHANGED),
        (halved_and_viewed, CHANGED),
        (scores_gone, CHANGED),
        (scores_gone_before_a_dropout, CHANGED),
        (queries_gone, CHANGED),
        (keys_gone, CHANGED),
        (gated_by_squares, "its weights go into sum too"),
        (gated_by_the_largest, "its weights go into max too"),
        (kept_elsewhere, "its weights go into __setitem__ too"),
        (in_two_steps, "its weights are multiplied with one another"),
        (with_what_was, "its weights and values are multiplied and added to something at once"),
        (over_all_pairs, "a softmax over more than the keys, or fewer"),
        (capped_in_place, NO_PRODUCT),
        (clamped, NO_PRODUCT),
        (from_below, NO_PRODUCT),
        (taken_from_a_table, NO_PRODUCT),
        (divides_a_table, NO_PRODUCT),
        (times_a_table, NO_PRODUCT),
        (of_the_first_text, "its values have rows that its weights do not have"),
        (heads_among_rows, "with heads in the rows of its queries"),
        (heads_among_rows_of_scores, "with heads in the rows of its queries"),
    ],
)
def test_no_weight_is_used_where_an_edit_does_not_reach(writes: Writes, why: str, x: Tensor) -> None:
    net = Net(writes).eval()
    with torch.no_grad(), pytest.raises(RefusedModel, match=rf"layers\.0 \(Attention: .*{why}"):
        heedful.attach(net, HALVE, inputs=x)


def logarithms(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    return weights @ v, weights.log()


def halved_later_through_a_view(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).softmax(-1)
    heads = weights @ v
    weights.view(B * H, N, N).mul_(0.5)
    return heads, weights


@pytest.mark.parametrize("writes", [logarithms, halved_later_through_a_view])
def test_changed_weights_are_not_given_for_weights(writes: Writes, x: Tensor) -> None:
    net = Net(writes, weights=True).eval()
    with torch.no_grad(), pytest.raises(RefusedModel, match=CHANGED):
        heedful.attach(net, HALVE, inputs=x)


def test_in_place_changes_are_seen_while_running(x: Tensor) -> None:
    net = Net(plain).eval()
    with heedful.attach(net, HALVE, inputs=x) as run:
        for layer in net.layers:
            layer.writes = emptied_in_place
        with pytest.raises(NotEntered, match=CHANGED):
            run(x)


class Weighs(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return product(q, k).softmax(-1)


def test_weights_of_a_module_within_are_not_followed(x: Tensor) -> None:
    def by_another(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return net.weighs(q, k) @ v, None

    net = Net(by_another).eval()
    for layer in net.layers:
        layer.weighs = Weighs()
    with pytest.raises(RefusedModel, match="writes none out that it can follow"):
        heedful.attach(net, HALVE, inputs=x)


def a_difference_of_halves(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """As timm's differential attention where it is not fused."""
    halves = product(q, k).softmax(-1).view(B, H // 2, 2, N, N)
    weights = (halves[:, :, 0] - 0.5 * halves[:, :, 1]).repeat_interleave(2, 1)
    return weights @ v, None


def halves_in_one_call(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    one, other = product(q, k).softmax(-1).chunk(2, 1)
    return (one - 0.5 * other).repeat_interleave(2, 1) @ v, None


def a_mean_of_heads(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return product(q, k).softmax(-1).mean(1, keepdim=True) @ v, None


def beside_a_sink(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = torch.cat([product(q, k), net.table[None, :, :, :1].expand(B, H, N, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v, None


@pytest.mark.parametrize("writes", [a_difference_of_halves, halves_in_one_call, a_mean_of_heads, beside_a_sink])
def test_parts_of_weights_are_weights_and_no_layer_is_passed_over(writes: Writes, x: Tensor) -> None:
    net = Net(plain).eval()
    net.layers[1].writes = writes  # type: ignore[assignment]
    with torch.no_grad(), pytest.raises(RefusedModel, match=r"layers\.1 \(Attention: a softmax of its own: .*only="):
        heedful.attach(net, HALVE, inputs=x)


def test_a_router_s_largest_weights_are_no_attention(x: Tensor) -> None:
    class Routed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x @ x.new_ones(H * D, 4)).softmax(-1).topk(2).values.sum(-1, keepdim=True)

    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * (x @ x.new_ones(H * D, 4)).softmax(-1)[..., :1]
            return x + (x @ x.mT) @ x

    for other in (Routed(), Gated()):
        heedful.attach(nn.Sequential(Net(plain), other).eval(), HALVE, inputs=x).close()
