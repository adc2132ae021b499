"""AttentionAT: scores nudged along the loss's gradient, in the second forward of each two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from heedful import attach, models
from heedful.authoring import FieldError
from heedful.conformance.tolerances import close, close_model
from heedful.methods import AttentionAT
from tests.by_hand import heads_of, llama_states
from tests.test_checkpointing import checkpointed

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
LAYERS, HEADS = 2, 4
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


def _by_hand(model: Any, added: Sequence[Tensor], ids: Tensor = IDS) -> Tensor:
    """The loss of a llama with something added to its scores."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        q, k, n = rotate(q), rotate(k), ids.shape[1]
        scores = q @ k.repeat_interleave(2, 1).mT / q.shape[-1] ** 0.5 + added[layer]
        return heads_of(scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1), v)

    logits = model.lm_head(llama_states(model, ids, attend))[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _nudges(model: Any, size: float) -> list[Tensor]:
    leaves = [torch.zeros(2, HEADS, 12, 12, requires_grad=True) for _ in range(LAYERS)]
    found = []
    for slope in torch.autograd.grad(_by_hand(model, leaves), leaves):
        rows = [row * (size / float(row.norm())) if bool(row.any()) else row for row in slope.flatten(0, 2)]
        found.append(torch.stack(rows).view_as(slope))
    return found


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_the_second_forward_is_nudged_by_the_first_ones_gradient(size: float) -> None:
    model = models.tiny("llama").train()
    plain, nudged = _by_hand(model, (0.0, 0.0)), _by_hand(model, nudges := _nudges(model, size))  # type: ignore[arg-type]
    assert all(bool(x.any()) for x in nudges)
    weights = list(model.parameters())
    slopes = torch.autograd.grad(plain + nudged, weights)
    with attach(model, AttentionAT(size)) as run:
        for want in (plain, nudged) * 2:
            found = run(IDS, labels=IDS, use_cache=False).loss
            found.backward()
            assert close_model(found.detach(), want.detach())
    for p, slope in zip(weights, slopes, strict=True):
        assert close_model(p.grad, 2 * slope)
    assert float(nudged.detach()) > float(plain.detach())


def test_the_differences_of_interpretable_training_make_the_same_nudge() -> None:
    """r_t = sum_k alpha_tk d_tk, alpha = size * g / |g|, g the gradient at alpha = 0, d_t of norm one: the paper's."""
    draw = torch.Generator().manual_seed(3)
    score, slope = (torch.randn(7, generator=draw, dtype=torch.float64) for _ in range(2))
    differences = score[:, None] - score[None]
    directions = differences / differences.norm(dim=1, keepdim=True)
    alpha = torch.zeros(7, 7, dtype=torch.float64, requires_grad=True)
    ((score + (alpha * directions).sum(1)) * slope).sum().backward()  # a loss whose gradient at the scores is `slope`
    found = (2.0 * alpha.grad / alpha.grad.norm() * directions).sum(1)  # type: ignore[operator, union-attr]
    assert close(found, 2.0 * AttentionAT().direction(slope[None, None, None])[0, 0, 0])


def test_at_rest_and_without_a_size_nothing_is_added() -> None:
    model = models.tiny("llama")
    plain = model(IDS).logits
    with attach(model, AttentionAT()) as run:
        for _ in range(2):
            run(IDS, labels=IDS).loss.backward()
        assert torch.equal(run(IDS).logits, plain)
    model = models.tiny("llama", attn_implementation="eager").train()
    plain = model(IDS).logits
    run = attach(model, AttentionAT.neutral(), backend="reference")
    for _ in range(2):
        found = run(IDS, labels=IDS)
        found.loss.backward()
        assert torch.equal(found.logits, plain)
    run.close()


def test_without_a_gradient_of_the_same_shape_a_forward_is_plain() -> None:
    model = models.tiny("llama").train()
    plain, shorter = _by_hand(model, (0.0, 0.0)), _by_hand(model, (0.0, 0.0), IDS[:, :9])  # type: ignore[arg-type]
    with attach(model, AttentionAT()) as run:
        with torch.no_grad():
            run(IDS)
        first = run(IDS, labels=IDS, use_cache=False).loss
        assert close_model(first.detach(), plain.detach())
        first.backward()
        second = run(IDS[:, :9], labels=IDS[:, :9], use_cache=False).loss
        assert close_model(second.detach(), shorter.detach())
        second.backward()
        third = run(IDS[:, :9], labels=IDS[:, :9], use_cache=False).loss
        assert not close_model(third.detach(), shorter.detach())


def test_an_evaluation_between_the_two_changes_nothing() -> None:
    model = models.tiny("llama").train()
    nudged = _by_hand(model, _nudges(model, 1.0))
    with attach(model, AttentionAT()) as run:
        run(IDS, labels=IDS, use_cache=False).loss.backward()
        model.eval()
        with torch.no_grad():
            run(IDS)
        model.train()
        assert close_model(run(IDS, labels=IDS, use_cache=False).loss.detach(), nudged.detach())


def test_a_checkpoint_nudges_again_as_it_did() -> None:
    found = []
    for model in (models.tiny("llama").train(), checkpointed(reentrant=False)):
        with attach(model, AttentionAT()) as run:
            for _ in range(4):
                model.zero_grad()
                run(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert close_model(found[1], found[0])


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"AttentionAT.size = -1.0: must be 0 or more"):
        AttentionAT(-1)
    with pytest.raises(FieldError, match=r"AttentionAT.size = inf: must be 0 or more and finite"):
        AttentionAT(float("inf"))
