"""Generation on a left-padded batch, with its cache, under a stack that changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

import heedful
from heedful.conformance.tolerances import DEPTH, ROUNDINGS, error, unit
from heedful.core.errors import HeedfulError
from heedful.core.method import Part

from . import tiny

NEW_TOKENS = 4


def generated(one: tiny.Tiny, only: list[str] | None, what: Part) -> dict[str, Any] | None:
    """How far the logits of each step are from the model's own, in roundings; None where a class does not generate."""
    if not isinstance(one.model, GenerationMixin) or "input_ids" not in one.inputs:
        return None
    inputs = _left_padded(one.inputs)
    try:
        native = _logits(one.model, inputs)
    except Exception as failure:  # noqa: BLE001 - whatever the model itself says
        return {"native": f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"}
    try:
        with heedful.attach(one.model, what, only=only, backend="reference") as run:
            found = _logits(run, inputs)
    except HeedfulError as refusal:
        return {"refused": f"{type(refusal).__name__}: {refusal}"}
    far = _apart(found, native)
    if far > ROUNDINGS * DEPTH and getattr(one.model, "_supports_sdpa", False):
        # where a query may see nothing, eager attention takes a mean of all values, and zeros are what sdpa gives too
        one.model.set_attn_implementation("sdpa")
        other = _logits(one.model, inputs)
        one.model.set_attn_implementation("eager")
        if _apart(other, native) > ROUNDINGS * DEPTH:
            return {
                "roundings": round(_apart(found, other), 2),
                "as": "sdpa, from which its own eager attention differs",
            }
    return {"roundings": round(far, 2) if far != float("inf") else None}


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference in roundings."""
    if len(found) != len(wanted):
        return float("inf")
    return max((error(a, b) / unit(b) for a, b in zip(_sane(found), _sane(wanted), strict=True)), default=0.0)


def _left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows turned round, where all that is there is text with padding on the right."""
    text = inputs.get("attention_mask")
    if set(inputs) != {"input_ids", "attention_mask"} or text is None or text.ndim != 2:
        return {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    return {k: v.flip(1) for k, v in inputs.items()}


def _logits(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(tiny.SEED)
    out = model.generate(
        **{k: v.clone() for k, v in inputs.items()}, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return list(out.logits)


def _sane(logits: list[Tensor]) -> list[Tensor]:
    return [x.masked_fill(x == torch.finfo(x.dtype).min, 0.0) for x in logits]
