"""HASTE: the cross-entropy in loops, which batch and layer is whose, and that it ends."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from heedful import attach, fit, models
from heedful.authoring import Call
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.methods import HASTE

N = 19
TEXT = torch.arange(N)[None] >= torch.tensor([[0], [4]])


def maps(seed: int, heads: int = 4) -> Tensor:
    scores = 2 * torch.randn(2, heads, N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.softmax(-1)


def call(layer: int, forward: int, text: Tensor | None = None) -> Call:
    return replace(Bare(text=text, depth=9).call, layer=layer, forward=forward)


def by_hand(found: Tensor, wanted: Tensor, pads: tuple[int, int] = (0, 0)) -> Tensor:
    """The mean over heads that both have and rows of text."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, pad in enumerate(pads):
        for h in range(min(found.shape[1], wanted.shape[1])):
            for i in range(pad, N):
                count += 1
                for j in range(N):
                    total = total - wanted[b, h, i, j] * torch.log(found[b, h, i, j])
    return total / count


@pytest.mark.parametrize("heads", [2, 4, 5])
def test_the_loss_and_its_gradient(heads: int) -> None:
    teacher = {f"{i}.{layer}": maps(10 * i + layer, heads) for i in range(2) for layer in (3, 4)}
    method = HASTE(0.7, 9, (1, 2), 2, Fitted({**teacher, "batches": torch.tensor(2)}))
    for layer, forward, name in ((1, 0, "0.3"), (2, 3, "1.4"), (1, 8, "0.3")):
        one, other = maps(99).requires_grad_(), maps(99).requires_grad_()
        losses = method.align(one, call(layer, forward)), 0.7 * by_hand(other, teacher[name]) / 2
        assert close(*losses)
        for x in losses:
            x.backward()
        assert one.grad is not None
        assert other.grad is not None
        assert bool(other.grad.any())
        assert close(one.grad, other.grad)


def test_padding_is_not_aligned() -> None:
    teacher = maps(1)
    method = HASTE(1.0, 9, (0,), 0, Fitted({"0.0": teacher, "batches": torch.tensor(1)}))
    assert close(method.align(maps(2), call(0, 5, TEXT)), by_hand(maps(2), teacher, (0, 4)))


def test_weights_of_zero_have_a_finite_loss() -> None:
    method = HASTE(1.0, 9, (0,), 0, Fitted({"0.0": maps(1), "batches": torch.tensor(1)}))
    found = method.align(torch.zeros(2, 4, N, N, dtype=torch.float64), call(0, 0))
    assert close(found, torch.tensor(-math.log(1e-8), dtype=torch.float64))


def test_it_ends_and_is_for_its_layers() -> None:
    method = HASTE(until=3, layers=(1, 2))
    assert [method.idle(call(1, n)) for n in range(5)] == [False, False, False, True, True]
    assert [method.idle(call(n, 0)) for n in range(4)] == [True, False, False, True]
    assert HASTE(0.0).idle(call(4, 0))
    assert HASTE(until=0).idle(call(4, 0))


def test_a_fit_keeps_a_teachers_maps_and_they_join_the_students_loss_while_it_lasts() -> None:
    teacher = models.tiny("vit", image_size=16, num_hidden_layers=3)
    student = models.tiny("vit", image_size=16, num_hidden_layers=3, seed=1)
    batches = [models.tiny_inputs(teacher, seed=i) for i in range(2)]
    method = fit(HASTE(0.5, 2, (0, 1), 1), teacher, batches)
    assert method.maps is not None
    assert sorted(method.maps) == ["0.1", "0.2", "1.1", "1.2", "batches"]
    assert method.maps["batches"] == 2
    eager = models.tiny("vit", image_size=16, num_hidden_layers=3, attn_implementation="eager")
    for i, batch in enumerate(batches):
        seen = eager(**batch, output_attentions=True).attentions
        for layer in (1, 2):
            assert close_model(method.maps[f"{i}.{layer}"], seen[layer])
    labels, alone = torch.tensor([0, 1]), copy.deepcopy(student)
    with attach(student, method) as run:
        for i, batch in enumerate([*batches, batches[0]]):
            found, plain = run(**batch, labels=labels).loss, cross_entropy(alone(**batch).logits, labels)
            if i < 2:
                assert close_model(found, plain + run.loss())
                assert run.loss() > 1
            else:
                assert close_model(found, plain)


def test_without_a_fit() -> None:
    found = HASTE(1.0, 9, (0, 1), 0, seed=3)
    draw = torch.Generator().manual_seed(3 * 1_000_003 + 1)
    wanted = torch.randn(2, 4, N, N, generator=draw).softmax(-1).double()
    assert close(found.align(maps(0), call(1, 0)), by_hand(maps(0), wanted) / 2)
    with pytest.raises(FieldError, match=r"HASTE\.maps = None: must be fitted with heedful.fit\(\) to the teacher"):
        HASTE(layers=(0,)).align(maps(0), call(0, 0))


def test_what_cannot_be() -> None:
    assert HASTE() == HASTE(0.5, 250_000, (4, 5, 6, 7), 4, None, None)
    assert HASTE.neutral().weight == 0
    assert HASTE.example() == HASTE(layers=(0,), behind=0, seed=0)
    assert HASTE(layers=(4,), behind=-4).behind == -4
    for wrong in (
        {"weight": -0.1}, {"weight": math.inf}, {"until": -1}, {"layers": ()}, {"layers": (-1,)}, {"behind": -5},
    ):  # fmt: skip
        with pytest.raises(FieldError, match=rf"HASTE\.{next(iter(wrong))} = "):
            HASTE(**wrong)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"HASTE\.batches = 0: must be 1 or more"):
        fit(HASTE(layers=(0,), behind=1), models.tiny("vit"), [])
    rule = r"must, with behind 1, be layers of the teacher, which has 3; for example layers=\(0, 1\)"
    with pytest.raises(FieldError, match=rf"HASTE\.layers = \(0, 2\): {rule}"):
        fit(HASTE(layers=(0, 2), behind=1), models.tiny("vit", num_hidden_layers=3), [])
    for given in (maps(0)[:1], maps(0)[..., :5], maps(0)[:, :, :5]):
        method = HASTE(1.0, 9, (0,), 0, Fitted({"0.0": given, "batches": torch.tensor(1)}))
        with pytest.raises(FieldError, match=r"has none for layer 0 of batch 0, whose map is \[2, 4, 19, 19\]"):
            method.align(maps(0), call(0, 7))
    with pytest.raises(FieldError, match=r"has none for layer 1 of batch 0"):
        replace(method, layers=(1,)).align(maps(0), call(1, 7))
