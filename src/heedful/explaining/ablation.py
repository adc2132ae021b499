"""What a model says without some of its heads, which hand over zeros, or their mean over texts, instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.figures import Head
from heedful.core.fitted import Fitted
from heedful.core.kinds.loaded import Tokenizer
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Method, Part, Stack
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Mean, Statistic
from heedful.engine.run import Run
from heedful.explaining.aim import fed, pairs
from heedful.methods.explain.patch import Patch
from heedful.models import Loaded


class _Means(Method):
    """The mean of what each head hands over, over all tokens of the texts."""

    @reads(Site.HEAD_OUTPUT)
    def add(self, heads: Tensor, call: Call) -> Statistic:
        mine = heads * call.is_text[..., None]
        return Mean.of(mine.double().sum((0, 2)), call.is_text.expand(len(heads), 1, -1).sum())


class _Constant(Method):
    """Heads hand over the same whatever they read."""

    values: Fitted  # <layer> [h d]

    def __repr__(self) -> str:
        return "mean of heads"

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        said = torch.einsum("ehd,hd->e", weights.o.float(), self.values[str(layer.number)].to(weights.o.device).float())
        said = said if weights.o_bias is None else weights.o_bias + said
        return replace(weights, o=torch.zeros_like(weights.o), o_bias=said)

    @at(Site.HEAD_OUTPUT)
    def put(self, heads: Tensor, call: Call) -> Tensor:
        constant = self.values[str(call.layer)].to(heads)[None, :, None].expand_as(heads)
        return constant.where(call.is_text[..., None], heads)


@asks
def ablate(
    model: nn.Module | Loaded,
    heads: Iterable[Head],
    *,
    mean: Any = None,
    tokenizer: Tokenizer | None = None,
    **how: Any,
) -> Run:
    """A run in which these heads, as (layer, head), hand over zeros: `with heedful.ablate(model, [(3, 1)]) as run:`.

    With `mean`, one text or a list of them (strings, token ids, or what the model is called with), they hand over their
    mean over all tokens of these, which takes away what they tell of a text and leaves what they always add. `how` goes
    to `attach`. `heedful.fold(model, run.stack)` writes it into the weights.
    """
    given = model if isinstance(model, Loaded) else Loaded(model, None, "")
    chosen = pairs("ablate()", heads)
    if not chosen:
        raise FieldError("ablate()", "heads", [], "names none", [(3, 1)])
    what = _instead("ablate()", given, mean, tokenizer, list(chosen), how)
    parts: list[Part] = [what.on(layer, mine) for layer, mine in chosen.items()]
    return attach(given.model, Stack(tuple(parts)), **how)


def _instead(
    owner: str, given: Loaded, mean: Any, tokenizer: Tokenizer | None, layers: list[int], how: Mapping[str, Any]
) -> Method:
    """What heads of these layers hand over that are taken out."""
    if mean is None:
        return Patch()
    several = isinstance(mean, Iterable) and not isinstance(mean, str | bytes | Mapping | Tensor)
    texts = list(mean) if several else [mean]
    if isinstance(mean, int | float):
        raise FieldError(owner, "mean", mean, "must be texts", ["Paris is the capital of France."])
    texts = [texts] if texts and all(isinstance(x, int) for x in texts) else texts
    if not texts:
        raise FieldError(owner, "mean", [], "names no text", ["Paris is the capital of France."])
    return _Constant(_means(owner, given, texts, tokenizer or given.tokenizer, layers, how))


@torch.no_grad()
def _means(
    owner: str, given: Loaded, texts: Iterable[Any], tokenizer: Any, layers: list[int], how: Mapping[str, Any]
) -> Fitted:
    reader = _Means().on(layers)
    with still(given.model), attach(given.model, reader, **how) as run:
        for text in texts:
            run(**fed(owner, given.model, text, tokenizer))
        return Fitted({str(layer): stat.value for layer, stat in run[reader].items()})
