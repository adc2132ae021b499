"""What a fit asks of a model that it judges by its loss: inputs with labels, made of the text where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from heedful.core.entry import Session
from heedful.core.errors import FieldError


def labelled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with labels: its own, or its text, padding left out."""
    inputs = dict(batch)
    if "labels" not in inputs and "input_ids" in inputs:
        labels = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        inputs["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
    return inputs


def loss_of(owner: object, run: Session, inputs: Mapping[str, Any]) -> Tensor:
    """The model's own loss under a run; `owner` is whose fit asks."""
    loss: Tensor | None = getattr(run(**inputs), "loss", None)
    if loss is None:
        raise FieldError(owner, "batches", sorted(inputs), "give this model no loss; add", {"labels": "..."})
    return loss
