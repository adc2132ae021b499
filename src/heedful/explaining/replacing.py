"""Which tokens an answer hangs on, by replacing some at random until those that count most carry it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from heedful.core.asked import require_fields
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, ProperShare

if TYPE_CHECKING:
    from heedful.explaining.aim import Aim

CERTAIN = 1 - 1e-6  # a change of probability of 1 would count without end


@dataclass(frozen=True)
class ReAGent:
    """Recursive attribution: asks a model for its answer to changed texts, and for nothing of its inside.

    In each step some tokens are replaced, and the probability of the answer falls by d. Replaced tokens gain
    logit((1 + d) / 2), the others lose it; scores are the softmax of these sums. When the model gives the answer among
    its `within` likeliest with all but the best `kept` tokens replaced, a run is done. Scores are the mean of runs.
    """

    paper = Paper(
        "P031",
        "ReAGent: A Model-agnostic Feature Attribution Method for Generative Language Models",
        "Zhixue Zhao, Boxuan Shan",
        2024,
        "2402.00794",
        differs=(
            "What stands in place of a token is drawn from `among`, or the whole vocabulary, as the authors' code can, "
            "which leaves out the tokens that begin and end a text and stand for unknown words; the paper takes "
            "RoBERTa's guesses, or words of the same part of speech.",
            "A fall of probability of 1, which would count without end there, is taken for one of a millionth less.",
            "Where no run is done in time the mean is of all of them; the authors' would be of none.",
            "Runs that are done are asked no more.",
        ),
    )
    replaced: ProperShare = 0.3  # chance of each token to be replaced in a step; the authors: 0.1 to 0.3
    kept: PositiveInt = 5  # tokens that must carry the answer alone; the authors: 5 or 8
    within: PositiveInt = 5  # of the likeliest answers, where it must be found; the authors: 3 or 5
    runs: PositiveInt = 5  # from other beginnings; the authors: 3 to 10
    steps: PositiveInt = 3000  # after which a run ends all the same; the authors: 3000 to 5000
    among: tuple[int, ...] = ()  # tokens to draw from; (): the whole vocabulary
    seed: int = 0

    def __post_init__(self) -> None:
        require_fields(self)

    @torch.no_grad()
    def scores(self, model: nn.Module, ids: Tensor, aim: Aim) -> Tensor:
        """How much each token of one text `[1 n]` counts for what is aimed at, `[n]`; they add up to 1."""
        if aim.target is None:
            raise RefusedModel(f"{type(model).__name__} gives no probability of an answer, which ReAGent asks for")
        draw = torch.Generator().manual_seed(self.seed)
        whole = self._answers(model, ids, aim)[:, aim.target]
        sums = torch.rand(self.runs, ids.shape[1], generator=draw)
        open_runs = torch.ones(self.runs, dtype=torch.bool)
        for _ in range(self.steps):
            mine = sums[open_runs]
            changed = torch.rand(mine.shape, generator=draw) < self.replaced
            answers = self._answers(model, self._other(model, ids, changed, draw), aim)
            fall = (whole - answers[:, aim.target]).clamp(-CERTAIN, CERTAIN)
            gain = (fall * 0.5 + 0.5).logit()[:, None]
            mine = mine + torch.where(changed, gain, -gain)
            sums[open_runs] = mine
            rest = torch.ones_like(changed).scatter(-1, mine.topk(min(self.kept, mine.shape[1])).indices, False)
            answers = self._answers(model, self._other(model, ids, rest, draw), aim)
            above = (answers > answers[:, aim.target, None]).sum(-1)
            open_runs[open_runs.nonzero()[above < self.within, 0]] = False
            if not bool(open_runs.any()):
                break
        done = open_runs if bool(open_runs.all()) else ~open_runs
        return sums[done].softmax(-1).mean(0)

    def _other(self, model: nn.Module, ids: Tensor, changed: Tensor, draw: torch.Generator) -> Tensor:
        """The text with other tokens where it is `changed [m n]`."""
        known = len(model.get_input_embeddings().weight)  # type: ignore[operator]
        vocabulary = torch.tensor(self.among) if self.among else torch.arange(known)
        if not 0 <= int(vocabulary.min()) <= int(vocabulary.max()) < known:
            raise FieldError(
                self, "among", self.among, f"must be tokens that the model knows, from 0 to {known - 1}", ()
            )
        drawn = vocabulary[torch.randint(len(vocabulary), changed.shape, generator=draw)]
        return ids.where(~changed.to(ids.device), drawn.to(ids.device))

    @staticmethod
    def _answers(model: nn.Module, texts: Tensor, aim: Aim) -> Tensor:
        """Of each text `[m n]`, how likely each answer is, `[m answers]`."""
        return aim.logits(model(input_ids=texts)).float().softmax(-1).cpu()
