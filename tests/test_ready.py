"""A decoding step that reads the prompt before it names its variants, and a model that is shown an image beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful import Prompt, decode, models
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Reader
from heedful.core.method import Method, Stack
from heedful.core.paper import UNPUBLISHED
from heedful.core.sites import Site, reads
from heedful.core.stats import Sum
from heedful.shown import Shown
from heedful.text_models import Combined


class _Tokens(Method):
    """How many tokens each layer is shown."""

    @reads(Site.QUERY)
    def count(self, query: Tensor, call: Call) -> Sum:
        return Sum.of(torch.tensor(float(query.shape[2])))

    def answer(self, readings: Readings) -> tuple[float, ...]:
        return tuple(float(x) for x in readings.values_by_layer)


class _Told(Decode):
    """Says the logits as they are; knows what it read."""

    paper = UNPUBLISHED
    read: tuple[float, ...] = ()

    def ready(self, prompt: Prompt, read: Reader) -> Decode:
        return replace(self, read=read(prompt, _Tokens()))

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        return {"prompt": (prompt, Stack())}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return logits["prompt"] + sum(self.read)


def test_a_step_is_made_ready_and_an_image_is_read() -> None:
    model: Any = models.tiny("llava", attn_implementation="eager")
    inputs = models.tiny_inputs(model, batch=1)
    prompt, pixels = Prompt(tuple(inputs["input_ids"][0].tolist())), {"pixel_values": inputs["pixel_values"]}
    with torch.no_grad(), Combined(model, _Told(), shown=Shown(pixels)) as voice:
        found = voice.read(prompt)[0]
        after = voice.go_on(7)
        wanted = model(**inputs).logits[0, -1]
        more = model(input_ids=torch.cat([inputs["input_ids"], torch.tensor([[7]])], 1), **pixels).logits[0, -1]
    tokens = 2 * 5 + 2 * 12  # a class token and four patches in two layers, the prompt in two
    assert close_model(found, wanted + tokens)
    assert close_model(after, more + tokens)
    assert decode(model, prompt, _Told(), new_tokens=1, inputs=pixels) == (int(wanted.argmax()),)
