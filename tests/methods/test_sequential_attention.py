"""SequentialAttention: each step's gradient on a llama written out, the order of choices, and what is pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from heedful import fit, models, operate
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods import SequentialAttention
from heedful.methods.compress.prune.sequential_attention import weights
from tests.by_hand import Steps, causal_map, heads_of, llama_states

INF = float("inf")


def masked(logits: Tensor, chosen: set[int]) -> Tensor:
    """The paper's factors in a loop."""
    total = sum(x.exp() for i, x in enumerate(logits) if i not in chosen)
    return torch.stack([torch.tensor(1.0) if i in chosen else x.exp() / total for i, x in enumerate(logits)])


def loss(model: Any, ids: Tensor, mask: Tensor, heads: int) -> Tensor:
    """The loss of a llama whose groups of heads are multiplied by a mask of all layers."""

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        given = heads_of(causal_map(rotate(q), rotate(k)), v)
        groups = k.shape[1]
        size = heads // groups
        return torch.stack([given[:, h] * mask[i * groups + h // size] for h in range(heads)], 1)

    logits = model.lm_head(llama_states(model, ids, attend))
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_factors_are_one_where_chosen_and_a_softmax_elsewhere() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for chosen in (set(), {2}, {0, 3}, {0, 1, 3}):
        taken = torch.tensor([i in chosen for i in range(4)])
        assert close(weights(logits, taken), masked(logits, chosen))
    assert weights(logits, torch.ones(4, dtype=torch.bool)).tolist() == [1.0] * 4


@pytest.mark.parametrize(("kind", "at_once"), [("llama", 1), ("mha", 1), ("mha", 3)])
def test_every_step_and_every_choice_by_hand(monkeypatch: pytest.MonkeyPatch, kind: str, at_once: int) -> None:
    model, adam = models.tiny(kind), torch.optim.Adam
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    total = 2 * groups
    batches = [torch.randint(3, 100, (2, 7)), torch.randint(3, 100, (1, 5))]
    steps = Steps(monkeypatch, "Adam")
    how = SequentialAttention(0.5, at_once=at_once, epochs=2, rate=0.5, seed=3)
    found = fit(how, model, [{"input_ids": ids} for ids in batches])
    draw = torch.Generator().manual_seed(3)
    chosen: set[int] = set()
    worth = torch.zeros(total)
    step, stay = 0, total // 2
    while len(chosen) < stay:
        logits = (1e-5 * torch.randn(total, generator=draw)).requires_grad_()
        optimiser = adam([logits], lr=0.5)
        for ids in (*batches, *batches):
            assert close(steps.before[step][0], logits.detach())
            (wanted,) = torch.autograd.grad(loss(model, ids, masked(logits, chosen), heads), [logits])
            assert close_model(steps.grads[step][0], wanted)
            if len(chosen) < total - 1:
                assert wanted.abs().max() > 1e-5
            logits.grad = steps.grads[step][0]  # what was found, so that roundings do not add up
            optimiser.step()
            step += 1
        left = masked(logits.detach(), chosen)
        free = sorted((i for i in range(total) if i not in chosen), key=lambda i: -float(left[i]))
        best, rounds = free[: min(at_once, stay - len(chosen))], stay - len(chosen)
        for i in free:
            worth[i] = left[i] + rounds * (i in best)
        chosen |= set(best)
    assert step == len(steps.grads)
    assert set(steps.rates) == {0.5}
    rank = torch.cat([found.importance[str(i)] for i in range(2)]).float()
    assert close(rank, worth)
    assert set(rank.argsort(descending=True)[:stay].tolist()) == chosen
    assert all(p.requires_grad for p in model.parameters())


def test_as_many_are_chosen_as_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("mha")
    inputs = models.tiny_inputs(model)
    steps = Steps(monkeypatch, "Adam")
    for share, wanted in ((0.25, 6), (0.75, 2), (1.0, 0)):
        steps.grads.clear()
        found = fit(SequentialAttention(share, epochs=1), model, [inputs])
        assert len(steps.grads) == wanted
        assert sum(float(x) >= 1 for layer in found.importance.values() for x in layer) == wanted
    other = fit(SequentialAttention(0.5, epochs=1, seed=1), model, [inputs])
    assert other == fit(SequentialAttention(0.5, epochs=1, seed=1), model, [inputs])
    assert other.importance != fit(SequentialAttention(0.5, epochs=1, seed=2), model, [inputs]).importance


def test_the_heads_that_were_not_chosen_go() -> None:
    model = models.tiny("mha")
    ranks = {"0": torch.tensor([4.5, 0.1, 0.2, 3.4]), "1": torch.tensor([0.3, 1.2, 2.3, 0.05])}
    how = SequentialAttention(0.5, form="zeros", importance=Fitted(ranks))
    assert set(how.dropped()) == {(0, 1), (0, 2), (1, 0), (1, 3)}
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        silent = operate(model, how)(**inputs).logits
        assert not close_model(silent, model(**inputs).logits)


def test_says_what_is_wrong() -> None:
    for wrong in ({"epochs": 0}, {"at_once": 0}, {"rate": 0.0}, {"rate": INF}, {"share": 2.0}, {"form": "odd"}):
        with pytest.raises(FieldError, match=rf"SequentialAttention\.{next(iter(wrong))} = "):
            SequentialAttention(**wrong)
    how = SequentialAttention()
    assert (how.share, how.at_once, how.epochs, how.rate, how.seed) == (0.2, 1, 5, 0.05, 0)
    assert SequentialAttention(at_once=1, epochs=1).epochs == 1
    model = models.tiny("mha")
    with pytest.raises(FieldError, match=r"SequentialAttention\.batches = 0"):
        fit(how, model, [])
    with pytest.raises(
        FieldError, match=r"importance = None: is not known yet.*SequentialAttention\(\), model, batches"
    ):
        operate(model, how)
