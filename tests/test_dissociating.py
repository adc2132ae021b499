"""Double dissociation: heads by what they carry, what is lost without them by hooks on the model, and refusals."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from heedful import models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.explaining import Ability, Dissociation, dissociate, patching

PROMPTS, COUNT = 8, 2


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3)


def ability(model, name: str, seed: int) -> Ability:
    """Prompts at random, each with what the model says to it, and what it says to another."""
    draw = torch.Generator().manual_seed(seed)
    clean, corrupt = (torch.randint(3, 127, (PROMPTS, 7), generator=draw) for _ in range(2))
    with torch.no_grad():
        right, wrong = (model(input_ids=ids).logits[:, -1].argmax(-1) for ids in (clean, corrupt))
    return Ability(name, clean, corrupt, right, wrong)


def lead_without(model, what: Ability, heads) -> float:
    """The mean lead on the second half, what heads hand to the output projection set to zero."""

    def hook(layer: int):
        def silence(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            for n, h in heads:
                if n == layer:
                    x[..., 8 * h : 8 * h + 8] = 0
            return (x, *args[1:])

        return silence

    layers = enumerate(model.model.layers)
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(hook(n)) for n, layer in layers]
    with torch.no_grad():
        logits = model(input_ids=what.clean).logits[:, -1]
    for each in hooks:
        each.remove()
    half = range(PROMPTS // 2, PROMPTS)
    return sum(float(logits[i, what.right[i]] - logits[i, what.wrong[i]]) for i in half) / len(half)


def test_heads_are_chosen_on_one_half_and_silenced_on_the_other(model) -> None:
    one, other = ability(model, "one", 1), ability(model, "other", 2)
    found = dissociate(model, one, other, count=COUNT, draws=3)
    shares = []
    for what in (one, other):
        half = slice(PROMPTS // 2)

        def metric(logits: Tensor, what: Ability = what, half: slice = half) -> Tensor:
            last = logits[:, -1]
            rows = torch.arange(len(last))
            return last[rows, what.right[half]] - last[rows, what.wrong[half]]

        shares.append(patching(model, what.clean[half], what.corrupt[half], metric, estimate=True).share)
    apart = {(n, h): float(shares[0][n, h] - shares[1][n, h]) for n in range(3) for h in range(4)}
    ranked = sorted(apart, key=lambda head: -apart[head])
    assert found.heads == (tuple(ranked[:2]), (ranked[-1], ranked[-2]))
    draw = random.Random(0)
    drawn = [draw.sample(ranked[2:-2], 2) for _ in range(3)]
    for column, what in enumerate((one, other)):
        whole = lead_without(model, what, ())
        assert float(found.lead[column]) == pytest.approx(whole, rel=1e-4)
        wanted = [1 - lead_without(model, what, heads) / whole for heads in found.heads]
        wanted.append(1 - sum(lead_without(model, what, heads) for heads in drawn) / 3 / whole)
        assert close_model(found.lost[:, column], torch.tensor(wanted))


def test_a_double_dissociation_is_the_smaller_difference() -> None:
    lost = torch.tensor([[0.5, 0.1], [0.2, 0.9], [0.05, 0.0]])
    found = Dissociation(("recall", "reasoning"), (((0, 1),), ((2, 3),)), lost, torch.tensor([3.0, 1.5]))
    assert found.double == pytest.approx(0.3)  # of recall: 0.5 by its own heads, 0.2 by the others
    assert Dissociation(found.names, found.heads, lost.flip(1), found.lead).double == pytest.approx(-0.8)
    assert found.figure.rows == ["heads of recall", "heads of reasoning", "others, at random"]
    assert found.figure.columns == ("recall", "reasoning")
    assert found.figure.values is lost
    assert repr(found).splitlines() == [
        "lead of the right answer: recall 3.00, reasoning 1.50",
        "  without heads of recall: recall loses +50%, reasoning loses +10%",
        "  without heads of reasoning: recall loses +20%, reasoning loses +90%",
        "  without others, at random: recall loses +5%, reasoning loses +0%",
        "  heads of recall: 0.1",
        "  heads of reasoning: 2.3",
    ]
    assert "recall" in found._repr_html_()


def test_the_model_stays_as_it_is(model) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dissociate(model, ability(model, "one", 1), ability(model, "other", 2), count=1, draws=1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_model_that_learns_is_asked_at_rest(model) -> None:
    learning = models.tiny("llama", num_hidden_layers=3, attention_dropout=0.5)
    learning.load_state_dict(model.state_dict())
    learning.train()
    both = ability(model, "one", 1), ability(model, "other", 2)
    found, wanted = (dissociate(each, *both, count=1, draws=1) for each in (learning, model))
    assert torch.equal(found.lead, wanted.lead)
    assert torch.equal(found.lost, wanted.lost)
    assert learning.training


def test_heads_that_hand_over_nothing_lose_nothing_and_are_no_warning() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    for layer in model.model.layers[1:]:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
    found = dissociate(model, ability(model, "one", 1), ability(model, "other", 2), count=4, draws=1)
    assert found.lost.isfinite().all()
    assert float(found.lost[2].abs().max()) == 0


def test_says_what_is_wrong(model) -> None:
    one = ability(model, "one", 1)
    with pytest.raises(FieldError, match="must be 4 or fewer"):
        dissociate(model, one, one, count=5)
    assert len(dissociate(model, one, ability(model, "other", 2), count=4, draws=1).heads[0]) == 4
    for setting in ({"count": 0}, {"draws": 0}, {"draws": 101}):
        with pytest.raises(FieldError, match="1"):
            dissociate(model, one, one, **setting)
    text = one.clean
    for bad in ((text[:0], text[:0]), (text[:, :0], text[:, :0]), (text, text[:, :5]), (text[0], text[0])):
        with pytest.raises(FieldError, match="must be prompts of one length"):
            Ability("bad", *bad, one.right, one.wrong)
    for right, wrong in ((one.right[:3], one.wrong), (one.right, one.wrong[:3])):
        with pytest.raises(FieldError, match="a token for each of 8 prompts"):
            Ability("bad", text, text, right, wrong)
    parts = {"clean": text, "corrupt": text, "right": one.right, "wrong": one.wrong}
    for name, given in parts.items():
        with pytest.raises(FieldError, match=rf"Ability.{name} = torch.float32: must be token ids"):
            Ability("bad", **{**parts, name: given.float()})
    few = one.part(slice(1))
    with pytest.raises(FieldError, match=r"dissociate\(\).other = 1: must have 2 prompts or more"):
        dissociate(model, one, few, count=1)
    turned = Ability("wrong", one.corrupt, text, one.right, one.wrong)
    with pytest.raises(FieldError, match=r"dissociate\(\).one = -.*: is its lead, and must be above 0"):
        dissociate(model, turned, one, count=1)


def test_two_prompts_are_enough(model) -> None:
    two = ability(model, "one", 1).part(slice(2))
    assert float(dissociate(model, two, two, count=1, draws=1).lead[0]) == pytest.approx(
        lead_of(model, two.part(slice(1, 2))), rel=1e-4
    )


def lead_of(model, what: Ability) -> float:
    with torch.no_grad():
        (last,) = model(input_ids=what.clean).logits[:, -1]
    return float(last[what.right] - last[what.wrong])
