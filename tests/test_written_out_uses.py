"""What else becomes of scores, and what is put in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful.adapters.operations.uses import overlap
from heedful.conformance.tolerances import close
from heedful.core.errors import NotEntered, RefusedModel
from tests.test_written_out import HALVE, TWICE, Attention, B, H, N, Net, Writes, halved, plain, x
from tests.test_written_out_refused import CHANGED, NO_PRODUCT, product

__all__ = ["x"]
pytestmark = pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")
LATER = torch.ones(N, N).triu(1) > 0
REPLACED = "some of its scores are replaced by others, which are seen"


def refused(writes: Writes, x: Tensor, why: str, weights: bool = False) -> None:
    net = Net(writes, weights).eval()
    with torch.no_grad(), pytest.raises(RefusedModel, match=rf"layers\.0 \(Attention: .*{why}"):
        heedful.attach(net, HALVE, inputs=x)


def served(writes: Writes, x: Tensor, louder: bool = True) -> None:
    """Halved weights, and queries twice as loud, are those of a module that does so itself."""

    def also(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return writes(net, 2 * q, k, v)

    net = Net(writes, weights=True).eval()
    for edit, itself in ((HALVE, halved(writes)), (TWICE, also))[: 2 if louder else 1]:
        other = Net(itself, weights=True).eval()
        other.load_state_dict(net.state_dict())
        with heedful.attach(net, edit, inputs=x) as run:
            assert all(close(a, b) for a, b in zip(run(x), other(x), strict=True))


# scores that are used elsewhere


def gives_its_scores(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return scores.softmax(-1) @ v, scores


def gives_its_masked_scores(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    raw = product(q, k)
    scores = raw.masked_fill(LATER, -1e9)
    return scores.softmax(-1) @ v, raw


def gives_their_half(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return scores.softmax(-1) @ v, scores / 2


def keeps_its_scores(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    net.last = product(q, k)
    return net.last.softmax(-1) @ v, None


def gated_by_scores(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return scores.softmax(-1) @ v * scores.mean(-1, keepdim=True).sigmoid(), None


def gated_by_the_highest(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    highest, _ = scores.max(-1, keepdim=True)
    return scores.softmax(-1) @ v * highest, None


def linear_too(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return scores.softmax(-1) @ v + scores @ v, None


def asks_how_high(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    if scores.max().item() > 1e6:
        raise OverflowError
    return scores.softmax(-1) @ v, None


def sharpened_by_another(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return scores.softmax(-1) @ v + 0 * scores.log_softmax(-1).sum(), None


@pytest.mark.parametrize(
    ("writes", "why"),
    [
        (gives_its_scores, "its scores are given too"),
        (gives_its_masked_scores, "its scores are given too"),
        (gives_their_half, "its scores are given too"),
        (keeps_its_scores, "its scores are given too"),
        (gated_by_scores, "its scores go into mean too"),
        (gated_by_the_highest, "its scores go into max too"),
        (linear_too, "its scores go into .*matmul.* too"),
        (asks_how_high, "its scores go into max too"),
        (sharpened_by_another, "its weights go into sum too"),
    ],
)
def test_no_score_is_used_where_an_edit_does_not_reach(writes: Writes, why: str, x: Tensor) -> None:
    refused(writes, x, why, weights=writes in (gives_its_scores, gives_its_masked_scores, gives_their_half))


class RealFormer(nn.Module):
    """Each layer adds the scores of the one before, which are handed on in a notebook that all share."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        adds = self.adds_in_place if in_place else self.adds
        self.layers = nn.ModuleList(Attention(adds) for _ in range(3))

    def adds_in_place(self, net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        scores = product(q, k)
        scores += self.notes.get("scores", 0.0)
        self.notes["scores"] = scores
        return scores.softmax(-1) @ v, None

    def adds(self, net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        scores = product(q, k) + self.notes.get("scores", 0.0)
        self.notes["scores"] = scores
        return scores.softmax(-1) @ v, None

    def forward(self, x: Tensor) -> Tensor:
        self.notes: dict[str, Tensor] = {}
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_scores_that_the_next_layer_adds_are_refused(in_place: bool, x: Tensor) -> None:
    net = RealFormer(in_place).eval()
    with pytest.raises(RefusedModel, match=r"layers\.0 .*its scores go into .*add.* too") as said:
        heedful.attach(net, HALVE, inputs=x)
    assert "only=['layers.2']" in str(said.value)  # nobody adds those of the last


def test_scores_that_are_given_later_are_refused_then(x: Tensor) -> None:
    net = Net(plain).eval()
    with heedful.attach(net, HALVE, inputs=x) as run:
        for layer in net.layers:
            layer.writes, layer.weights = gives_its_scores, True
        with pytest.raises(NotEntered, match="otherwise than when heedful looked: its scores are given too"):
            run(x)


def less_their_highest(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """What all scores of a row lose changes no weight; shapes and types of scores are nobody's numbers."""
    scores = product(q, k)
    scores = scores - scores.amax(-1, keepdim=True)
    seen = (~LATER).expand_as(scores).type_as(scores)
    low = torch.full_like(scores, -1e9) * scores.new_ones(1)
    scores = scores + (1 - seen) * low
    assert scores.shape[-1] == scores.size(-1) == N
    scores -= scores.max(-1, keepdim=True).values
    weights = scores.softmax(-1)
    return weights @ v, weights


def test_what_a_row_loses_and_shapes_are_no_other_use(x: Tensor) -> None:
    served(less_their_highest, x, louder=False)


def with_what_they_were(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return torch.where(LATER, scores / 2, scores).softmax(-1) @ v, None


def bent(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return (scores + scores.tanh()).softmax(-1) @ v, None


def over_their_spread(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return (scores / scores.std()).softmax(-1) @ v, None


def rounded_down(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.div(product(q, k), 0.5, rounding_mode="floor").softmax(-1) @ v, None


def one_louder(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    scores[..., 0].mul_(3)
    return scores.softmax(-1) @ v, None


def taken_from_a_number(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return (1.0 - product(q, k)).softmax(-1) @ v, None


def added_several_times(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.add(net.table, product(q, k), alpha=2).softmax(-1) @ v, None


def queries_gone_before_a_softmax(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    asks = q.clone()
    scores = product(asks, k)
    asks.zero_()
    return scores.softmax(-1) @ v, None


def keys_gone_with_their_room(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    room = torch.cat([k[:, :, :1], k], 2)
    scores = product(q, room[:, :, 1:])
    room.zero_()
    return scores.softmax(-1) @ v, None


@pytest.mark.parametrize(
    "writes",
    [
        with_what_they_were,
        bent,
        over_their_spread,
        rounded_down,
        one_louder,
        taken_from_a_number,
        added_several_times,
        queries_gone_before_a_softmax,
        keys_gone_with_their_room,
    ],
)
def test_scores_that_are_no_product_are_refused(writes: Writes, x: Tensor) -> None:
    refused(writes, x, NO_PRODUCT)


def in_one_room(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Values are written beside the keys once these are multiplied."""
    room = torch.stack([k, k])
    scores = product(q, room[0])
    room[1] = v
    weights = scores.softmax(-1)
    return weights @ room[1], weights


def test_what_is_written_beside_keys_changes_none(x: Tensor) -> None:
    served(in_one_room, x)


# scores in whose place something else is put


def zeroed_by_a_table(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (product(q, k) * (~LATER if net.hides else torch.ones(N, N))).softmax(-1)
    return weights @ v, weights


def zeroed_by_a_mask(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).masked_fill(LATER & net.hides, 0.0).softmax(-1)
    return weights @ v, weights


def zeroed_by_a_choice(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = torch.where(LATER & net.hides, net.table * 0, product(q, k)).softmax(-1)
    return weights @ v, weights


def zeroed_by_its_choice(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).where(~LATER | (not net.hides), torch.tensor(0.0)).softmax(-1)
    return weights @ v, weights


def zeroed_in_place(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    scores[:, :, LATER & net.hides] = 0.0
    weights = scores.softmax(-1)
    return weights @ v, weights


def moved(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    if net.hides:
        scores[..., 0] = scores[..., 1]
    weights = scores.softmax(-1)
    return weights @ v, weights


def louder_elsewhere(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    if net.hides:
        scores[..., 0] = scores[..., 0] * 3
    return scores.softmax(-1) @ v, None


def turned_around(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    if net.hides:
        scores[..., 0] = 1.0 - scores[..., 0]
        scores[..., 1] = net.table[..., 0] - scores[..., 1]
        scores[..., 2] = torch.add(net.table[..., 0], scores[..., 2], alpha=2)
    return scores.softmax(-1) @ v, None


ZEROED = [
    louder_elsewhere,
    turned_around,
    zeroed_by_a_table,
    zeroed_by_a_mask,
    zeroed_by_a_choice,
    zeroed_by_its_choice,
    zeroed_in_place,
    moved,
]


@pytest.mark.parametrize("writes", ZEROED)
def test_what_stands_in_the_place_of_scores_must_be_hidden(writes: Writes, x: Tensor) -> None:
    net = Net(writes).eval()
    for layer in net.layers:
        layer.hides = True
    with torch.no_grad(), pytest.raises(RefusedModel, match=REPLACED):
        heedful.attach(net, TWICE, inputs=x)
    for layer in net.layers:
        layer.hides = False
    with torch.no_grad(), heedful.attach(net, TWICE, inputs=x) as run:
        run(x)
        for layer in net.layers:
            layer.hides = True
        with pytest.raises(NotEntered, match=f"otherwise than when heedful looked: {REPLACED}"):
            run(x)


def hidden_afterwards(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A table of ones and zeros, numbers of a table, and places that are written to, all of which nobody sees."""
    scores = (product(q, k) * (~LATER)).view(B, H, N, N)
    scores = torch.where(LATER, torch.full((N, N), -1e4), scores)
    scores[..., 3] = torch.full((), -2e4)
    weights = scores.softmax(-1)
    return weights @ v, weights


def hidden_by_where(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = product(q, k).where(~LATER, torch.tensor(-1e9)).masked_fill(mask=LATER, value=-1e9).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize("writes", [hidden_afterwards, hidden_by_where])
def test_what_is_hidden_may_be_anything(writes: Writes, x: Tensor) -> None:
    served(writes, x)


def bounded_from_above(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return product(q, k).clamp(max=-1e4).softmax(-1) @ v, None


def bounded_from_below(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.maximum(product(q, k), torch.tensor(1e4)).softmax(-1) @ v, None


def bounded_by_name(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.clamp(product(q, k), -1e4, max=0.1).softmax(-1) @ v, None


@pytest.mark.parametrize("writes", [bounded_from_above, bounded_from_below, bounded_by_name])
def test_bounds_on_the_wrong_side_are_refused(writes: Writes, x: Tensor) -> None:
    refused(writes, x, NO_PRODUCT)


def times_what_learns(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return (product(q, k) * net.table).softmax(-1) @ v, None


def gated_by_what_learns(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return (product(q, k).softmax(-1) * net.table) @ v, None


@pytest.mark.parametrize(("writes", "why"), [(times_what_learns, NO_PRODUCT), (gated_by_what_learns, CHANGED)])
def test_a_table_that_learns_is_no_mask_for_being_ones(writes: Writes, why: str, x: Tensor) -> None:
    net = Net(writes).eval()
    for layer in net.layers:
        nn.init.ones_(layer.table)
    with pytest.raises(RefusedModel, match=why):
        heedful.attach(net, HALVE, inputs=x)


def test_tensors_overlap_where_they_share_as_much_as_one_number() -> None:
    row = torch.arange(6.0)
    assert overlap(row[:3], row[2:])
    assert overlap(row[2:], row[:3])
    assert overlap(row[::2], row[4:5])
    assert not overlap(row[:3], row[3:])
    assert not overlap(row[:3], row[3:3])
