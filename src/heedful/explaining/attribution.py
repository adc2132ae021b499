"""How much each token of a text matters for what a model says, as a method tells it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.errors import FieldError
from heedful.core.method import Part
from heedful.explaining.aim import Text, aim_of, following, ids_of


@asks
def attribute(
    model: nn.Module,
    prompt: Text,
    method: Part,
    *,
    target: int | None = None,
    position: int | None = None,
    only: str | Iterable[str] | None = None,
) -> Tensor:
    """A score for each token of one text, `[n]`: `method` is AttentionRollout, AttentionFlow, TransformerAttribution.

    What is explained is the logit of `target` (the likeliest, if none is given) at `position`: by default the last
    token, or the first where the model gives classes and its attention is not causal. A model without logits is
    explained by its mean state, from all positions. One forward and one backward; the maps of all layers are held at
    once where the method needs gradients.
    """
    ids = ids_of(prompt, model)
    with still(model):
        aim = aim_of(model, ids, target, position)
        with attach(model, method, only=only) as run, following(model):
            aim.raw(run(input_ids=ids)).sum().backward()
            found = run[method]
    n = ids.shape[1]
    if not (isinstance(found, list) and len(found) == 1 and found[0].shape == (1, n, n)):
        rule = f"must answer with one relevance [1 {n} {n}] for the text, of every token for every position"
        raise FieldError("attribute()", "method", method, rule, "AttentionRollout()")
    return aim.row(found[0][0]).detach()
