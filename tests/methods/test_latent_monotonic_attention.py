"""Latent monotonic attention: paths by trying all of them, and what is seen around a path's places."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.mask import Padding
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import LatentMonotonicAttention
from tests.methods.walking import ONLY, goes_on_in_a_model

LENGTHS = (8, 5)  # of the two sources: in the second, the last place must be looked at again
TEXT = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
FILLED = torch.tensor([[True] * 6, [False, True, True, True, True, False]])
METHOD = LatentMonotonicAttention(3, 0.7)


def _bare(training: bool = True) -> Bare:
    bare = Bare(Shape(q=6, k=8), dtype=torch.float64, rules=(Padding(TEXT),))
    queries = Positions.row(0, 6, is_filled=FILLED[:, None])
    bare.call = replace(bare.call, cross=True, training=training, queries=queries)
    return bare


def _chance(scores: Tensor, path: tuple[int, ...]) -> Tensor:
    """log p of a path through a source of so many places, token by token; -inf if it does not go on."""
    before, total = -1, scores.new_zeros(())
    for row, place in zip(scores, path, strict=True):
        begin = min(before + 1, len(row) - 1)
        if place < begin:
            return scores.new_tensor(-math.inf)
        total = total + row[place] - torch.log(sum(torch.exp(x) for x in row[begin:]))
        before = place
    return total


def _greedy(scores: Tensor) -> tuple[int, ...]:
    path: list[int] = []
    for row in scores:
        begin = min(path[-1] + 1, len(row) - 1) if path else 0
        path.append(max(range(begin, len(row)), key=lambda j: float(row[j])))
    return tuple(path)


def _by_hand(bare: Bare, training: bool) -> tuple[Tensor, Tensor]:
    """Heads of the tokens that are text, zeros for the others; and -log p of all paths, the mean over tokens."""
    out, unlikely = torch.zeros_like(bare.q), torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        rows = [i for i in range(6) if FILLED[b, i]]
        for h in range(4):
            scores = bare.q[b, h, rows] @ bare.k[b, h // 2, :length].T / math.sqrt(8)
            paths = itertools.combinations_with_replacement(range(length), len(rows))
            path = max(paths, key=lambda p: float(_chance(scores.detach(), p))) if training else _greedy(scores)
            unlikely = unlikely - _chance(scores, path)
            for i, row, place in zip(rows, scores, path, strict=True):
                near = [j for j in range(length) if place - 1 <= j <= place + 1]
                out[b, h, i] = row[near].softmax(0) @ bare.v[b, h // 2, near]
    return out, unlikely / FILLED.sum()


def _found(bare: Bare) -> tuple[Tensor, Tensor]:
    """The same by the class, its weight taken off."""
    call = replace(bare.call, keep=TEXT[:, None, None], state=State())
    weights = METHOD.weigh(bare.q @ call.spread(bare.k).mT * call.scale, call)
    penalty = METHOD.unlikely(weights, call)
    assert penalty is not None
    return weights @ call.spread(bare.v) * FILLED[:, None, :, None], penalty / 0.7


def test_in_training_the_likeliest_path_of_all() -> None:
    bare = _bare()
    wanted, unlikely = _by_hand(bare, training=True)
    found, penalty = _found(bare)
    assert close(found, wanted)
    assert close(penalty, unlikely)
    assert close(bare.run(METHOD, "reference")[0] * FILLED[:, None, :, None], wanted)


def test_at_rest_the_likeliest_place_behind_the_last() -> None:
    bare = _bare(training=False)
    wanted, _ = _by_hand(bare, training=False)
    assert not close(wanted, _by_hand(bare, training=True)[0])
    assert close(bare.run(METHOD, "reference")[0] * FILLED[:, None, :, None], wanted)
    call = replace(bare.call, keep=TEXT[:, None, None])
    assert METHOD.unlikely(METHOD.weigh(torch.zeros(2, 4, 6, 8, dtype=torch.float64), call), call) is None
    assert not call.state.forward


def test_the_first_steps_loss_and_gradient() -> None:
    bare = _bare()
    leaves = [bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    losses = [heads.pow(2).sum() + 5 * apart for heads, apart in (_found(bare), _by_hand(bare, training=True))]
    assert close(losses[0].detach(), losses[1].detach())
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_a_path_in_training_goes_on_from_the_last_call() -> None:
    scores = torch.randn(1, 1, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    call = replace(Bare(Shape(b=1, h=1, g=1, q=2, k=6), rules=()).call, cross=True, queries=Positions.row(2, 2))
    call.state.cache["end"], call.state.cache["place"] = torch.tensor([2]), torch.tensor([[3]])
    weights = LatentMonotonicAttention(1).weigh(scores, call)
    after = [(i, j) for i in range(3, 6) for j in range(min(i + 1, 5), 6)]

    def chance(path: tuple[int, int]) -> float:
        first, second = (scores[0, 0, i] for i in range(2))
        begin = min(path[0] + 1, 5)
        return float(first[path[0]] - first[3:].logsumexp(0) + second[path[1]] - second[begin:].logsumexp(0))

    best = max(after, key=chance)
    assert [row.tolist().index(1.0) for row in weights[0, 0]] == list(best)
    assert int(call.state.cache["place"]) == best[1] + 1


@pytest.mark.parametrize("training", [True, False])
def test_padding_behind_a_text_takes_no_place(training: bool) -> None:
    bare = _bare(training)
    call = replace(bare.call, keep=TEXT[:, None, None], state=State())
    scores = bare.q @ call.spread(bare.k).mT * call.scale
    METHOD.weigh(scores, call)
    for h in range(4):
        row = scores[1, h, 1:5, : LENGTHS[1]]  # the second text ends before the last row
        paths = itertools.combinations_with_replacement(range(LENGTHS[1]), 4)
        path = max(paths, key=lambda p: float(_chance(row, p))) if training else _greedy(row)
        assert int(call.state.cache["place"][1, h]) == path[-1] + 1


@pytest.mark.parametrize("window", [1, 2, 4, 5])
def test_the_window(window: int) -> None:
    scores = torch.full((1, 1, 1, 12), -1.0)
    scores[..., 6] = 3.0
    call = replace(Bare(Shape(b=1, h=1, g=1, q=1, k=12), rules=()).call, cross=True, training=False)
    weights = LatentMonotonicAttention(window).weigh(scores, replace(call, queries=Positions.row(0, 1)))
    begin = 6 - window // 2
    assert weights[0, 0, 0].nonzero().flatten().tolist() == list(range(begin, begin + window))


def test_what_sees_nothing_stays_where_it_is() -> None:
    bare = _bare()
    for training in (True, False):
        call = replace(bare.call, keep=torch.zeros(2, 1, 6, 8, dtype=torch.bool), state=State(), training=training)
        weights = METHOD.weigh(torch.zeros(2, 4, 6, 8, dtype=torch.float64), call)
        assert not weights.any()
        assert float(call.state.forward.pop(call.name)) == 0
        assert not call.state.cache["place"].any()


def test_in_a_model_step_by_step_and_padding_is_no_part_of_the_source() -> None:
    goes_on_in_a_model(LatentMonotonicAttention(3))


def test_in_a_model_its_loss_joins_the_models_own() -> None:
    model = models.tiny("bart").train()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    target = ids[:, :4].contiguous()
    with attach(model, METHOD, only=ONLY) as run:
        out = run(input_ids=ids, decoder_input_ids=target, labels=target)
        own = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), target.flatten())
        assert float(run.loss().detach()) > 0
        assert close_model(out.loss, own + run.loss())


def test_errors() -> None:
    assert METHOD.idle(Bare().call)
    assert not METHOD.idle(_bare().call)
    assert (LatentMonotonicAttention().window, LatentMonotonicAttention().weight) == (10, 0.1)
    assert LatentMonotonicAttention(1, 0.0).weight == 0
    with pytest.raises(FieldError, match=r"LatentMonotonicAttention.window = 0: must be 1 or more"):
        LatentMonotonicAttention(0)
    for weight in (-0.1, math.inf):
        with pytest.raises(FieldError, match=r"LatentMonotonicAttention.weight = .*: must be 0 or more"):
            LatentMonotonicAttention(weight=weight)
