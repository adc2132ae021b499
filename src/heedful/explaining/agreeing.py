"""Whether explanations of one text put its tokens in the same order: Kendall's tau of each pair of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.core.asked import asks
from heedful.core.errors import FieldError
from heedful.core.figures import Grid, printed
from heedful.core.paper import Paper
from heedful.explaining.attribution import Attribution

PAPER = Paper(
    "P021",
    "A Song of (Dis)agreement: Evaluating the Evaluation of Explainable Artificial Intelligence in Natural Language "
    "Processing",
    "Michael Neely, Stefan F. Schouten, Maurits Bleeker, Ana Lucic",
    2022,
    "2205.04559",
    "HHAI 2022",
)


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far explanations agree: 1 is the same order of tokens, 0 none of each other's, -1 the opposite one.

    Which of them is right it does not tell; that is what its authors warn of. `faithfulness` asks the model.
    """

    names: tuple[str, ...]
    tau: Tensor  # [texts names names]; nan where all scores of a text are alike

    @property
    def mean(self) -> Tensor:
        """The mean over texts `[names names]`."""
        return self.tau.nanmean(0)

    @asks
    def between(self, one: str, other: str) -> Tensor:
        """How far two explanations agree on each text, `[texts]`."""
        for name in (one, other):
            if name not in self.names:
                rule = f"must be one of {', '.join(self.names)}"
                raise FieldError("Agreement.between()", "name", name, rule, self.names[0])
        return self.tau[:, self.names.index(one), self.names.index(other)]

    @property
    def figure(self) -> Grid:
        what = "How far two explanations put the tokens of a text in the same order: 1 is the same, 0 unrelated."
        return Grid(
            "agreement", "Agreement of explanations", what, self.mean, self.names, self.names, "explanation",
            "explanation", "Kendall's tau",
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return printed(self)

    def __str__(self) -> str:
        texts, width = len(self.tau), max(len(name) for name in self.names) + 2
        rows = [f"Kendall's tau, the mean over {texts} text{'s' if texts > 1 else ''}"]
        for i, name in enumerate(self.names[1:], 1):
            told = (f"{x:+.2f} {other}" for x, other in zip(self.mean[i, :i].tolist(), self.names, strict=False))
            rows.append(f"{name:{width}}" + "  ".join(told))
        return "\n".join(rows)


@asks
def agreement(*texts: Mapping[str, Tensor | Attribution]) -> Agreement:
    """How far explanations of a text agree, each a score `[n]` for every token, by name; and the same of more texts.

    Kendall's tau, with ties taken out of what it is measured against (tau-b). Give magnitudes where the sign of a score
    is not meant, as of gradients: the authors do.
    """
    if not texts or len(texts[0]) < 2:
        good = {"rollout": "attribute(model, ids, AttentionRollout())", "mine": "torch.rand(n)"}
        raise FieldError("agreement()", "texts", texts, "must hold two explanations of a text, or more", good)
    names = tuple(texts[0])
    return Agreement(names, torch.stack([_taus(each, names) for each in texts]))


def _taus(text: Mapping[str, Tensor | Attribution], names: tuple[str, ...]) -> Tensor:
    """Of one text, `[names names]`."""
    if set(text) != set(names):
        raise FieldError("agreement()", "texts", sorted(text), "must be explained alike, each text", sorted(names))
    given = {name: x.scores if isinstance(x, Attribution) else x for name, x in text.items()}
    n = max(x.numel() for x in given.values())
    for name, scores in given.items():
        if scores.shape != (n,) or n < 2 or not bool(scores.isfinite().all()):
            rule = f"must be {max(n, 2)} finite scores, one a token"
            raise FieldError("agreement()", f"scores[{name!r}]", tuple(scores.shape), rule, torch.rand(max(n, 2)))
    # which of two tokens counts more, for every pair of them: tau-b is the cosine of these
    ordered = (given[name].detach().cpu().double() for name in names)
    signs = torch.stack([(x[:, None] - x).sign().flatten() for x in ordered])
    sizes = signs.norm(dim=1)
    return signs @ signs.mT / (sizes[:, None] * sizes)
