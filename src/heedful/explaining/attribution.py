"""How much each token of a text matters for what a model says, as a method tells it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.errors import FieldError
from heedful.core.figures import Grid
from heedful.core.kinds.loaded import Tokenizer
from heedful.core.method import Part
from heedful.explaining.aim import Text, aim_of, fed, following, ids_of, spelled
from heedful.explaining.drawn import Drawn
from heedful.explaining.replacing import ReAGent
from heedful.models import Loaded


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Drawn):
    """A score for each token of one text: `scores [n]`, and indexed like them. A notebook shows it."""

    tokens: list[str]
    scores: Tensor  # [n]
    method: str  # that told them

    def __getitem__(self, place: Any) -> Tensor:
        return self.scores[place]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.scores)

    @property
    def figure(self) -> Grid:
        what = f"How much each token matters for what the model says, by {self.method}."
        columns = [f"{i} {x}" for i, x in enumerate(self.tokens)]
        return Grid("attribution", "Attribution", what, self.scores[None], ["score"], columns, "", "token")

    def __repr__(self) -> str:
        order = self.scores.argsort(descending=True, stable=True).tolist()
        told = (f"{i} {self.tokens[i]!r} {float(self.scores[i]):.3g}" for i in order[:8])
        rest = ", ..." if len(order) > 8 else ""
        return f"{len(self)} tokens by {self.method}, highest first: {', '.join(told)}{rest}"


@asks
def attribute(
    model: nn.Module | Loaded,
    prompt: Text | str,
    method: Part | ReAGent,
    *,
    tokenizer: Tokenizer | None = None,
    target: int | None = None,
    position: int | None = None,
    only: str | Iterable[str] | None = None,
) -> Attribution:
    """A score for each token of one text, given as a string or as token ids.

    `method` is AttentionRollout, AttentionFlow, TransformerAttribution or ReAGent. What is explained is the logit of
    `target` (the likeliest, if none is given) at `position`: by default the last token, or the first where the model
    gives classes and its attention is not causal. A model without logits is explained by its mean state, from all
    positions.
    One forward and one backward; the maps of all layers are held at once where the method needs gradients. ReAGent
    looks at no layer, and runs the model on changed texts alone, hundreds of times.
    """
    given = model if isinstance(model, Loaded) else Loaded(model, None, "")
    whole, words = given.model, tokenizer or given.tokenizer
    ids = ids_of(fed("attribute()", whole, prompt, words)["input_ids"] if isinstance(prompt, str) else prompt, whole)
    with still(whole):
        aim = aim_of(whole, ids, target, position)
        if isinstance(method, ReAGent):
            if only is not None:
                rule = "narrows what is looked at inside, and ReAGent looks at nothing"
                raise FieldError("attribute()", "only", only, rule, None)
            return Attribution(spelled(ids[0], words), method.scores(whole, ids, aim), repr(method))
        with attach(whole, method, only=only) as run, following(whole):
            aim.raw(run(input_ids=ids)).sum().backward()
            found = run[method]
    n = ids.shape[1]
    if not (isinstance(found, list) and len(found) == 1 and found[0].shape == (1, n, n)):
        rule = f"must answer with one relevance [1 {n} {n}] for the text, of every token for every position"
        raise FieldError("attribute()", "method", method, rule, "AttentionRollout()")
    return Attribution(spelled(ids[0], words), aim.row(found[0][0]).detach(), repr(method))
