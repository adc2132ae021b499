"""Inputs with labels, and the loss a model gives for them."""

from __future__ import annotations

import pytest
import torch

from heedful import attach, models
from heedful.core.errors import FieldError
from heedful.core.method import Stack
from heedful.kit.labels import labelled, loss_of


def test_labels_are_the_text_without_padding_or_those_given() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    assert torch.equal(labelled({"input_ids": ids})["labels"], ids)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    found = labelled({"input_ids": ids, "attention_mask": mask})
    assert found["labels"].tolist() == [[5, 6, 7], [-100, 9, 4]]
    assert torch.equal(found["input_ids"], ids)
    own = {"input_ids": ids, "labels": torch.tensor([1, 0])}
    assert labelled(own) == own
    assert labelled(own) is not own
    assert labelled({"pixel_values": ids}) == {"pixel_values": ids}


def test_the_loss_is_the_models_own() -> None:
    model = models.tiny("llama")
    inputs = labelled(models.tiny_inputs(model))
    with attach(model, Stack()) as run:
        assert torch.equal(loss_of(None, run, inputs), model(**inputs).loss)
    inner = model.model
    with attach(inner, Stack()) as run, pytest.raises(FieldError, match=r"give this model no loss; add"):
        loss_of("X", run, models.tiny_inputs(model))
