"""SADR: the penalty on rows that look more at an edited subject, by loops over heads and keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.sadr import SADR

ENDS = (3, 5)  # the last token of the subject in each text


def _prompts(pad: str) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[int], list[int]]:
    """Two texts, of 8 and of 6 tokens; where their subjects stand in the text; first and last column of each."""
    ids = torch.randint(3, 120, (2, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if pad == "left":
        mask[1, :2] = 0
    else:
        mask[1, 6:] = 0
    roles = [{"subject": ((1, 2), (2, ENDS[0] + 1))}, {"subject": ((0, 2), (3, ENDS[1] + 1))}]
    starts = [0, 2 if pad == "left" else 0]
    return {"input_ids": ids, "attention_mask": mask}, roles, starts, [7, 7 if pad == "left" else 5]


def _maps(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = model(**inputs, output_attentions=True).attentions
    return found


def _by_hand(
    before: tuple[Tensor, ...], now: tuple[Tensor, ...], starts: list[int], rows: list[int], weight: float
) -> Tensor:
    total = torch.zeros(())
    for p, q in zip(before, now, strict=True):
        for text in range(2):
            row, subject = rows[text], starts[text] + ENDS[text]
            most = max(float(p[text, head, row, subject]) for head in range(4))
            for head in range(4):
                if q[text, head, row, subject].item() <= most:
                    continue
                for key in range(p.shape[-1]):
                    a, b = p[text, head, row, key] + 1e-8, q[text, head, row, key] + 1e-8
                    total = total + a * torch.log(a / b)
    return weight * total / 2


def _changed(model: Any, by: float) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(by)
        model.model.layers[1].self_attn.q_proj.weight.mul_(by)
        model.model.layers[0].self_attn.q_proj.weight.mul_(by)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_the_loss_and_its_gradient_are_those_of_loops(pad: str) -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs, roles, starts, rows = _prompts(pad)
    method = fit(SADR(weight=0.3), model, [{**inputs, "roles": roles}])
    with torch.no_grad():
        before = _maps(model, inputs)
    _changed(model, 4.0)
    wanted = _by_hand(before, _maps(model, inputs), starts, rows, 0.3)
    assert wanted.item() > 0.01
    part = model.model.layers[0].self_attn.k_proj.weight
    (slope,) = torch.autograd.grad(wanted, part)
    with attach(model, method, roles=roles) as run:
        run(**inputs)
        loss = run.loss()
        assert close_model(loss, wanted)
        (found,) = torch.autograd.grad(loss, part)
    assert close_model(found, slope)
    assert slope.abs().max() > 1e-4


def test_some_heads_are_left_alone() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs, _, _, rows = _prompts("right")
    with torch.no_grad():
        before = _maps(model, inputs)
        _changed(model, 4.0)
        now = _maps(model, inputs)
    over = [
        float(q[t, h, rows[t], ENDS[t]]) > max(float(p[t, g, rows[t], ENDS[t]]) for g in range(4))
        for p, q in zip(before, now, strict=True)
        for t in range(2)
        for h in range(4)
    ]
    assert 0 < sum(over) < len(over)  # or the tests beside could not tell who is meant


@pytest.mark.filterwarnings("ignore:this run changed nothing")
def test_an_edit_that_changes_nothing_costs_nothing() -> None:
    model = models.tiny("llama")
    inputs, roles, _, _ = _prompts("right")
    method = fit(SADR(), model, [{**inputs, "roles": roles}])
    with attach(model, method, roles=roles) as run:
        plain = model(**inputs).logits
        assert close_model(run(**inputs).logits, plain)
        assert run.loss().abs().item() < 1e-6


def test_the_target_may_stand_behind_the_prompt() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    ids = torch.randint(3, 120, (2, 8), generator=torch.Generator().manual_seed(7))
    roles = {"subject": ((2, 4),)}
    method = fit(SADR(), model, [{"input_ids": ids, "roles": roles}])
    _changed(model, 4.0)
    longer = torch.cat([ids, torch.tensor([[9, 11], [4, 5]])], 1)
    losses = []
    with attach(model, method, roles=roles) as run:
        for each in (ids, longer):
            run(input_ids=each)
            losses.append(run.loss())
    assert losses[0].item() > 1e-4
    assert close_model(losses[1], losses[0])


def test_targets_of_unlike_length_may_move_padding_on_the_left() -> None:
    """Rows are compared token by token of the text, wherever padding has put it."""
    model = models.tiny("llama", attn_implementation="eager")
    inputs, roles, _, _ = _prompts("left")
    method = fit(SADR(), model, [{**inputs, "roles": roles}])
    _changed(model, 4.0)
    first, second = inputs["input_ids"][0], inputs["input_ids"][1, 2:]
    longer = torch.stack([torch.cat([first, torch.tensor([9])]), torch.cat([second, torch.tensor([9, 11, 12])])])
    losses = []
    with attach(model, method, roles=roles) as run:
        for each in (inputs, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}):
            run(**each)
            losses.append(run.loss())
    assert losses[0].item() > 1e-4
    assert close_model(losses[1], losses[0])


def test_random_rows_are_the_seeds_own() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs, roles, _, rows = _prompts("right")
    with torch.no_grad():
        now = _maps(model, inputs)
    total = 0.0
    for layer, q in enumerate(now):
        draw = torch.Generator().manual_seed(1_000_003 * 2 + layer)
        p = torch.randn(2, 4, 8, generator=draw).softmax(-1)
        for text in range(2):
            a, b = (x.double() + 1e-8 for x in (p[text], q[text, :, rows[text]]))
            total += float((a * (a / b).log()).sum()) / 2
    with attach(model, SADR(weight=1.0, seed=2), roles=roles) as run:
        run(**inputs)
        assert math.isclose(run.loss().item(), total, rel_tol=1e-4)
    assert not close(torch.tensor(total), torch.tensor(0.0))


def test_errors() -> None:
    model = models.tiny("llama")
    inputs, roles, _, _ = _prompts("right")
    with pytest.raises(FieldError, match=r"SADR.weight = -1.0: must be 0 or more"):
        SADR(weight=-1.0)
    with pytest.raises(FieldError, match="must name a role"):
        SADR(role="")
    asked = pytest.raises(FieldError, match="to the prompts before the edit, or seed")
    with asked, attach(model, SADR(), roles=roles) as run:
        run(**inputs)
    method = fit(SADR(), model, [{**inputs, "roles": roles}])
    one = {name: x[:1] for name, x in inputs.items()}
    shorter = {name: x[:, :6] for name, x in inputs.items()}
    for wrong, where, match in (
        (one, roles[:1], "of 2 prompts, and here are 1"),
        (shorter, roles, "prompts like these"),
    ):
        with pytest.raises(FieldError, match=match), attach(model, method, roles=where) as run:
            run(**wrong)
    other = models.tiny("llama", num_hidden_layers=3)
    with pytest.raises(FieldError, match="no rows for layer 2"), attach(other, method, roles=roles) as run:
        run(**inputs)
    with pytest.raises(FieldError, match="no spans named 'subject'"), attach(model, method) as run:
        run(**inputs)
    for batches in ([], [inputs], [{**inputs, "roles": roles}] * 2):
        with pytest.raises(FieldError, match="must be one batch of prompts"):
            fit(SADR(), model, batches)
