"""What a fit reads off its batches, each of which the model is run with under the batch's own "roles"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.method import Part

T = TypeVar("T")
Batch = Mapping[str, Any]
GOOD = {"input_ids": "..."}


def at_least_one(owner: object, batches: Iterable[T], good: Batch = GOOD) -> Iterator[T]:
    """The batches, one by one; refused where there are none."""
    none = True
    for batch in batches:
        none = False
        yield batch
    if none:
        raise FieldError(owner, "batches", 0, "must be 1 or more", [good])


def with_roles(owner: object, batches: Iterable[Batch], *roles: str, good: object) -> list[Batch]:
    """The batches; refused where there are none, or where one has "roles" in which one of these is not named."""
    found = list(batches)
    if not found or any(not _names(batch.get("roles", {}), roles) for batch in found):
        named = " and ".join(f'"{role}"' for role in roles)
        raise FieldError(owner, "batches", len(found), f"must be 1 or more, each with roles naming {named}", good)
    return found


def _names(given: Any, roles: Iterable[str]) -> bool:
    """Whether the roles of all texts, or each text's own, name all of these."""
    return all({*roles} <= {*each} for each in (given if isinstance(given, list) else [given]))


@torch.no_grad()
def read(context: FitContext, reader: Part, batches: Iterable[Batch]) -> Any:
    """What the reader has to tell once the model has run with all batches."""
    with context.attach(reader) as run:
        for batch in batches:
            run.roles = batch.get("roles")
            run(**{name: x for name, x in batch.items() if name != "roles"})
        return run[reader]
