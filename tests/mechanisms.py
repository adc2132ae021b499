"""Mechanisms by what a module knows that they ask for."""

from __future__ import annotations

from heedful import catalogue
from heedful.conformance.model_laws import in_training_alone
from heedful.core.method import Method, as_stack
from heedful.core.sites import Site

MECHANISMS = {
    name: kind
    for name, kind in catalogue.entries().items()
    if issubclass(kind, Method)
    and catalogue.family(kind) == "mechanisms"
    and not as_stack(kind.example()).touches(Site.EMBEDDING, Site.RESIDUAL)  # which a module has no say in
}


BY_TOKENS = ("DARE", "InjectedPatterns")  # ask which tokens they are shown, and a module is shown embeddings
AFTER = ("AttentionAT",)  # acts in a forward behind one that has been learned from
LOWER = ("ContextualMemoryReweaving",)  # reads the layers before, and a module has none
OUTSIDE = (*BY_TOKENS, *LOWER)  # of what a module knows
DRAWN = tuple(  # anew in each call
    name
    for name, kind in MECHANISMS.items()
    if "text" in kind.subjects and name not in AFTER and in_training_alone(kind.example())
)
READ = [name for name, kind in MECHANISMS.items() if "text" in kind.subjects and name not in (*OUTSIDE, *AFTER, *DRAWN)]
