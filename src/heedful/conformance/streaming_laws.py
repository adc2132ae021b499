"""A text that is read at once, and piece by piece."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from heedful.adapters.cache_name import CACHE, cache_of
from heedful.api import attach
from heedful.conformance.bare import ROLES
from heedful.conformance.model_laws import for_text
from heedful.conformance.place import reseeded
from heedful.conformance.subjects import CROSS, LENGTH, SPLIT, TEXT, subjects_of, text, tiny_model
from heedful.conformance.tolerances import close_model, error
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.errors import RefusedModel, SiteError
from heedful.core.method import Method

WAYS = (("token by token", [LENGTH - 2, 1, 1]), ("in chunks", 6))  # and how long each piece is


@law("reading a text at once and token by token come to the same")
def streaming(method: Method) -> None:
    answering = [subject for subject in subjects_of(method) if subject in (SPLIT, CROSS)]
    if not answering:
        for_text(method)
    if not method.chunk_invariant:
        raise DoesNotApply("does not claim it: what it does depends on the call")
    for subject in answering:
        given = dict(subject.inputs())
        said = given.pop("decoder_input_ids")
        with torch.no_grad(), subject.attach(tiny_model(subject.kinds[0]), method) as run:
            _in_pieces(run, "an answer", given, "decoder_input_ids", said)
    if TEXT in subjects_of(method):
        _text("llama", method)
        with suppress(RefusedModel, SiteError):  # its cache lets go of what its windows have left
            _text("mistral", method)


def _text(kind: str, method: Method) -> None:
    reseeded()
    with torch.no_grad(), attach(tiny_model(kind), method, roles=ROLES) as run:
        _in_pieces(run, f"a text of {kind}", {}, "input_ids", text())


def _in_pieces(run: Any, what: str, given: dict[str, Any], name: str, ids: Tensor) -> None:
    whole = run(**given, **{name: ids}, use_cache=False).logits
    for way, sizes in WAYS:
        past, parts = None, []
        for piece in ids.split(sizes, 1):
            out = run(**given, **{name: piece}, use_cache=True, **{CACHE: past})
            past = cache_of(out)
            parts.append(out.logits)
        found = torch.cat(parts, 1)
        if not close_model(found, whole):
            raise Broken(f"{what} {way}: logits differ by {error(found, whole):.2g}")
