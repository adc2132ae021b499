"""The laws that every method must keep, open to methods from anywhere: `heedful.check(MyMethod)`."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from heedful.conformance import place
from heedful.conformance.verdict import Broken, DoesNotApply, Law, Report, Verdict
from heedful.core.asked import asks
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import FieldError, nearest

__all__ = ["Law", "Report", "Verdict", "check", "laws"]


def laws() -> dict[str, Law]:
    """Every law by name."""
    from heedful.conformance import (
        call_laws,
        fold_laws,
        merging_laws,
        model_laws,
        precision_laws,
        saving_laws,
        step_laws,
        streaming_laws,
        text_laws,
    )

    homes = (
        call_laws,
        model_laws,
        fold_laws,
        merging_laws,
        precision_laws,
        saving_laws,
        step_laws,
        streaming_laws,
        text_laws,
    )
    return {found.name: found for home in homes for found in vars(home).values() if isinstance(found, Law)}


@asks
def check(
    method: CatalogueEntry | type[CatalogueEntry], only: str | Iterable[str] = (), device: torch.device | str = "cpu"
) -> Report:
    """Try every law on a method: on its class's example settings, or on the very settings given; on one device."""
    only = (only,) if isinstance(only, str) else tuple(only)
    entry = method.example() if isinstance(method, type) and issubclass(method, CatalogueEntry) else method
    if unknown := [name for name in only if name not in laws()]:
        rule = f"is no law.{nearest(str(unknown[0]), laws())}"
        raise FieldError("check()", "only", unknown[0], rule, (next(iter(laws())),))
    verdicts = []
    for name, law in laws().items():
        if (only and name not in only) or entry.kind not in law.kinds:
            continue
        try:
            with place.on(device):
                law(entry)
        except DoesNotApply as why:
            verdicts.append(Verdict(name, "does not apply", str(why)))
        except Broken as how:
            verdicts.append(Verdict(name, "broken", str(how)))
        except Exception as problem:  # noqa: BLE001 - a method that fails anywhere breaks the law that was tried
            verdicts.append(Verdict(name, "broken", f"raised {type(problem).__name__}: {problem}"))
        else:
            verdicts.append(Verdict(name, "kept"))
    return Report(repr(entry), tuple(verdicts))
