"""Laws for what acts beside the attention call: prompts, decoding, weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from heedful.api import arrange, fit, operate
from heedful.conformance.model_laws import fingerprint, logits
from heedful.conformance.place import place
from heedful.conformance.subjects import text, tiny_model
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.errors import FieldError
from heedful.core.kinds.conversion import Conversion
from heedful.core.kinds.decode import Decode
from heedful.core.kinds.tokens import Prompt, Tokens
from heedful.core.kinds.weights import Surgery
from heedful.text_models import decode

_SPAN = ((13, 15),)
ROLES = {"documents": ((1, 5), (5, 8), (9, 13)), "question": ((15, 19),)}
ROLES |= dict.fromkeys(("context", "image", "marked"), _SPAN)


def _prompt() -> Prompt:
    return Prompt(tuple(text()[0].tolist()), ROLES)


@law("a prompt is made of its tokens and those declared, twice the same, and the model stays as it was", ("tokens",))
def prompt_steps(entry: Tokens) -> None:
    model = tiny_model("llama")
    before, given = fingerprint(model), _prompt()
    new = arrange(model, given, entry)
    if fingerprint(model) != before:
        raise Broken("the model changed")
    if not isinstance(new, Prompt):
        raise Broken(f"gave {type(new).__name__} and not a Prompt")
    if extra := Counter(new.tokens) - Counter((*given.tokens, *entry.adds(given))):
        raise Broken(f"the new prompt holds tokens that the old one has not and `adds` does not tell: {sorted(extra)}")
    if arrange(model, given, entry) != new:
        raise Broken("a second time gives another prompt")
    if (quiet := type(entry).neutral()) is None:
        raise DoesNotApply("has no neutral settings; the rest is kept")
    if arrange(model, given, quiet) != given:
        raise Broken(f"{quiet!r} changes the prompt")


@law(
    "decoding is twice the same, neutral settings decode as the model does, and the model stays as it was", ("decode",)
)
def decoding_steps(entry: Decode) -> None:
    model = tiny_model("llama")
    before, given = fingerprint(model), _prompt()
    found = decode(model, given, entry, new_tokens=8)
    if fingerprint(model) != before:
        raise Broken("the model changed")
    if decode(model, given, entry, new_tokens=8) != found:
        raise Broken("a second time gives other tokens")
    if (quiet := type(entry).neutral()) is None:
        raise DoesNotApply("has no neutral settings; the rest is kept")
    ids = torch.tensor([given.tokens], device=place())
    greedy = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)  # type: ignore[operator]
    if decode(model, given, quiet, new_tokens=8) != tuple(greedy[0, len(given) :].tolist()):
        raise Broken(f"{quiet!r} decodes otherwise than the model alone")


def _operated(model: nn.Module, entry: Surgery) -> nn.Module:
    """The model after an operation, which is fitted to text first where it cannot do without."""
    try:
        return operate(model, entry)
    except FieldError:
        return operate(model, fit(entry, model, [{"input_ids": text()}]))


@law("an operation leaves the model it was given as it was, and neutral settings change nothing", ("surgery",))
def surgery_is_clean(entry: Surgery) -> None:
    model = tiny_model("mha")
    before, native = fingerprint(model), logits(model, input_ids=text())
    edited = logits(_operated(model, entry), input_ids=text())
    if fingerprint(model) != before:
        raise Broken("the model it was given changed")
    if torch.equal(edited, native):
        raise Broken(f"{entry!r} changes nothing")
    if (quiet := type(entry).neutral()) is None:
        raise DoesNotApply("has no neutral settings; the rest is kept")
    if not torch.equal(logits(operate(model, quiet), input_ids=text()), native):
        raise Broken(f"{quiet!r} changes the model")


@law("a conversion edits and teaches a copy, twice the same, and leaves the model as it was", ("conversion",))
def conversion_is_clean(entry: Conversion) -> None:
    model, batches = tiny_model("llama"), [{"input_ids": text()}]
    before, native = fingerprint(model), logits(model, input_ids=text())

    def taught(how: Conversion) -> torch.Tensor:
        with fit(how, model, batches) as run:
            return logits(run.model, input_ids=text())

    found = taught(entry)
    if fingerprint(model) != before:
        raise Broken("the model it was given changed")
    if torch.equal(found, native):
        raise Broken(f"{entry!r} changes nothing")
    if torch.equal(found, taught(replace(entry, layer_epochs=0, epochs=0))):
        raise Broken(f"{entry!r} teaches nothing")
    if not torch.equal(found, taught(entry)):
        raise Broken("a second time gives another model")
