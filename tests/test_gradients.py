"""Gradients of weights against those of the model's own modules, head by head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, RefusedModel
from heedful.explaining import WeightGradients, weight_gradients
from heedful.explaining.gradients import NAMES
from tests.readers import ids
from tests.samples import uneven


def by_hand(model, batches: list[dict]) -> dict[str, list[list[list[float]]]]:
    """Of each projection of a llama: for each batch, layer and head, the sum of magnitudes and the largest."""
    found: dict[str, list] = {name: [] for name in NAMES}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        each: dict[str, list] = {name: [] for name in NAMES}
        for layer in model.model.layers:
            part = layer.self_attn
            rows = ((part.q_proj, 4), (part.k_proj, 2), (part.v_proj, 2))
            for name, (module, heads) in zip(NAMES, rows, strict=False):
                each[name].append(
                    [(float(g.abs().sum()), float(g.abs().max())) for g in module.weight.grad.chunk(heads)]
                )
            columns = part.o_proj.weight.grad.chunk(4, 1)
            each["output"].append([(float(g.abs().sum()), float(g.abs().max())) for g in columns])
        for name in NAMES:
            found[name].append(each[name])
    model.zero_grad()
    return found


def test_is_the_gradient_of_the_loss() -> None:
    model = models.tiny("llama")
    batches = [{"input_ids": ids(9, n, 2)} for n in range(3)]
    found = weight_gradients(model, batches)
    wanted = by_hand(model, [batch | {"labels": batch["input_ids"]} for batch in batches])
    for name in NAMES:
        mean = torch.tensor(wanted[name]).mean(0)  # [layers h 2]
        assert close(found.total[name].float(), mean[..., 0])
        assert close(found.peak[name].float(), mean[..., 1])
    with torch.no_grad():
        losses = [float(model(**batch, labels=batch["input_ids"]).loss) for batch in batches]
    assert found.loss == pytest.approx(sum(losses) / 3)


def test_labels_say_what_counts() -> None:
    model = models.tiny("llama")
    text = ids(9)
    labels = text.clone()
    labels[:, :6] = -100
    part = weight_gradients(model, [{"input_ids": text, "labels": labels}])
    wanted = by_hand(model, [{"input_ids": text, "labels": labels}])
    assert close(part.total["values"].float(), torch.tensor(wanted["values"])[0, ..., 0])
    whole = weight_gradients(model, [{"input_ids": text}])
    assert not close(part.by_layer.float(), whole.by_layer.float())


@pytest.mark.usefixtures("poison")
def test_padding_does_not_count() -> None:
    model = models.tiny("llama")
    text = ids(9)
    padded = torch.cat([text, torch.full((1, 4), 90)], 1)
    mask = torch.cat([torch.ones_like(text), torch.zeros(1, 4, dtype=torch.long)], 1)
    alone = weight_gradients(model, [{"input_ids": text}])
    beside = weight_gradients(model, [{"input_ids": padded, "attention_mask": mask}])
    assert close(beside.by_layer.float(), alone.by_layer.float())  # sums in float64 of what float32 rounded


def test_the_model_and_its_gradients_stay() -> None:
    model = models.tiny("llama").train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        weight_gradients(model, [{"input_ids": ids(9)}])
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(p.grad, torch.ones_like(p))


def test_dropout_rests() -> None:
    model, batch = models.tiny("bert", hidden_dropout_prob=0.5), {"input_ids": ids(9)}
    whole = weight_gradients(model, [batch])
    assert close(weight_gradients(model.train(), [batch]).by_layer, whole.by_layer)


def test_frozen_weights_have_gradients_all_the_same() -> None:
    model = models.tiny("llama")
    whole = weight_gradients(model, [{"input_ids": ids(9)}])
    frozen = weight_gradients(model.requires_grad_(False), [{"input_ids": ids(9)}])
    assert close(frozen.by_layer.float(), whole.by_layer.float())
    assert not any(p.requires_grad for p in model.parameters())


def test_one_part_of_a_model() -> None:
    model = models.tiny("t5")
    inputs = {name: x for name, x in models.tiny_inputs(model, length=8).items() if name != "decoder_input_ids"}
    batch = inputs | {"labels": inputs["input_ids"]}
    assert weight_gradients(model, [batch], only="encoder").total["queries"].shape == (2, 4)
    assert len(weight_gradients(model, [batch]).share) == 6


def test_a_layer_with_fewer_heads_has_no_gradients_beyond_them() -> None:
    found = weight_gradients(uneven(), [{"input_ids": ids(9)}])
    for each in (found.total, found.peak):
        assert each["queries"].isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert bool(found.share.isfinite().all())


def test_shares_and_depth() -> None:
    nan = float("nan")
    total = {
        "queries": torch.tensor([[1.0, 2.0], [0.0, 1.0], [2.0, nan]]),
        "keys": torch.tensor([[1.0], [0.0], [0.0]]),
        "values": torch.tensor([[0.0], [1.0], [0.0]]),
        "output": torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]]),
    }
    found = WeightGradients(total, {name: x / 10 for name, x in total.items()}, 1.25)
    assert found.by_layer.tolist() == [4.0, 2.0, 4.0]
    assert found.share.tolist() == pytest.approx([0.4, 0.2, 0.4])
    assert found.depth == pytest.approx(0.5)
    assert WeightGradients({"queries": total["queries"]}, {}, 0.0).depth == pytest.approx(0.5 / 6 + 2 / 6)
    assert repr(found) == (
        "loss 1.250; gradients by projection queries 60%, keys 10%, values 10%, output 20%; by layer 0: 40%, 1: 20%, "
        "2: 40%"
    )
    figure = found.figure
    assert figure.columns == ["queries 0", "queries 1", "keys 0", "values 0", "output 0", "output 1"]
    assert figure.rows == ["0", "1", "2"]
    assert figure.values[0].tolist() == pytest.approx([0.1, 0.2, 0.1, 0.0, 0.0, 0.0])
    assert figure.log
    assert "gradients" in found._repr_html_()


def test_says_what_is_wrong() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match="1 or more"):
        weight_gradients(model, [])
    with pytest.raises(FieldError, match="by name"):
        weight_gradients(model, ids(9))  # type: ignore[arg-type]
    with pytest.raises(RefusedModel):
        weight_gradients(nn.Linear(2, 2), [{"input_ids": ids(9)}])
    with pytest.raises(RefusedModel, match="gives no loss"):
        weight_gradients(model.model, [{"inputs_embeds": torch.randn(1, 5, 32)}])
