"""What stands at a place of the attention calls, whole and in every layer: to be looked at, or put elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor, nn

from heedful.adapters.wrapped import inside
from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import FieldError, ModelError
from heedful.core.kinds.loaded import Tokenizer
from heedful.core.method import Method, Part, Stack, as_stack
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.explaining.aim import fed_each
from heedful.models import Loaded

WHOLE = (Site.EMBEDDING, Site.HIDDEN, Site.QUERY, Site.KEY, Site.VALUE, Site.HEAD_OUTPUT, Site.OUTPUT, Site.RESIDUAL)


Text = str | Tensor | Iterable[int] | Mapping[str, Any] | Sequence[str | Tensor | Sequence[int]]


@overload
def activations(
    model: nn.Module | Loaded,
    text: Text,
    site: Site,
    *,
    layers: Iterable[int] | int | None = None,
    tokenizer: Tokenizer | None = None,
    stack: Part | Stack | None = None,
    **how: Any,
) -> dict[int, Tensor]: ...


@overload
def activations(
    model: nn.Module | Loaded,
    text: Text,
    site: Sequence[Site],
    *,
    layers: Iterable[int] | int | None = None,
    tokenizer: Tokenizer | None = None,
    stack: Part | Stack | None = None,
    **how: Any,
) -> dict[Site, dict[int, Tensor]]: ...


@torch.no_grad()
@asks
def activations(
    model: nn.Module | Loaded,
    text: Text,
    site: Site | Sequence[Site],
    *,
    layers: Iterable[int] | int | None = None,
    tokenizer: Tokenizer | None = None,
    stack: Part | Stack | None = None,
    **how: Any,
) -> dict[int, Tensor] | dict[Site, dict[int, Tensor]]:
    """What stands at a site in each layer, or in the `layers` named: `activations(model, text, Site.HEAD_OUTPUT)[3]`.

    `text` is a string, token ids, an image's pixels, a list of these, or all that the model is called with, a batch
    too: a mapping, or, of a model that is none of transformers, its first argument. Texts of a list are padded on the
    right. Shapes are the site's, as `[b h n d]` of HEAD_OUTPUT and `[b n e]` of RESIDUAL, padding included; take that
    on the left away before `Patch`, whose values stand by text position. EMBEDDING stands before the first layer
    alone, and half precision is shown as single. Under a `stack` it is what that leaves. `how` goes to `attach`.
    Several sites are read in one forward: `activations(model, text, [Site.QUERY, Site.KEY])[Site.KEY][3]`.
    `heedful.patterns` reads PATTERN.
    """
    sites = (site,) if isinstance(site, Site) else tuple(dict.fromkeys(site))
    if not sites or not set(sites) <= set(WHOLE):
        other = "heedful.patterns() reads PATTERN; " if Site.PATTERN in sites else ""
        rule = f"{other}must be one or more of {', '.join(x.name for x in WHOLE)}"
        raise FieldError("activations()", "site", site, rule, Site.HEAD_OUTPUT)
    given = model if isinstance(model, Loaded) else Loaded(inside(model), None, "")
    keepers = Stack(tuple(keeping(one).on(layers) for one in sites))
    with still(given.model), attach(given.model, as_stack(stack) | keepers, **how) as run:
        run(**fed_each("activations()", given.model, text, tokenizer or given.tokenizer))
        each = [{layer: stat.value[0].clone() for layer, stat in run[keeper].items()} for keeper in keepers]
    return each[0] if isinstance(site, Site) else dict(zip(sites, each, strict=True))


@cache
def keeping(site: Site) -> Method:
    """A reader that keeps what stands at a site, with its gradient where a backward follows."""

    def keep(self: Method, x: Tensor, call: Call) -> Statistic:
        require_once("activations()", call)
        if x.requires_grad:
            x.retain_grad()
        return Cat({"all": x})

    body = {"keep": reads(site)(keep), "__repr__": lambda self: f"activations({site})", "__module__": __name__}
    return type(f"_Keep{site.name.title()}", (Method,), body)()


def require_once(owner: str, call: Call, part: str = "") -> None:
    """Refuse a layer that runs again in one forward: what is kept of it, or of a part of its rows, is told by layer."""
    if (seen := f"{call.layer} {part}") in call.state.forward:
        raise ModelError(
            f"{owner}: {call.name} runs several times in one forward, and what is kept is told apart by layer; give "
            "each time a module of its own with the same weights (ALBERT: num_hidden_groups=num_hidden_layers)"
        )
    call.state.forward[seen] = True
