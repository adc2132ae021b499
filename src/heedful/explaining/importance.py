"""What each head of a model is worth alone: KL(p || p without it) of its answers, one head taken out at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.errors import FieldError, InactiveWarning, RefusedModel
from heedful.core.figures import Head, HeadMap, head_name
from heedful.core.kinds.conversion import Progress, Report
from heedful.core.kinds.loaded import Tokenizer
from heedful.core.paper import Paper
from heedful.engine.run import Run
from heedful.explaining.ablation import _instead, _Means
from heedful.explaining.aim import require_count, strongest, suiting
from heedful.explaining.drawn import Told
from heedful.explaining.states import named
from heedful.models import Loaded

PAPER = Paper(
    "P020",
    "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
    "Yiran Li, Junpeng Wang, Xin Dai, Liang Wang, Chin-Chia Michael Yeh, Yan Zheng, Wei Zhang, Kwan-Liu Ma",
    2023,
    "2303.13731",
    differs=(
        "The paper has several measures by pruning, which its abstract, all that was read of it, does not define. Here "
        "they are the divergence of the answers, what the likeliest loses, and what the loss rises by.",
        "Any model that gives logits is taken, and a head may hand over its mean; theirs are of vision, and pruned.",
        "How strongly heads look at near patches is told by AttentionProfile and OffsetLocalHeads; the authors' "
        "autoencoder of patterns and their page are not here.",
    ),
)


@dataclass(frozen=True, eq=False, repr=False)
class HeadImportance(Told):
    """What a model's answers lose without each head alone, `[layers h]`; nan where a layer has fewer heads."""

    divergence: Tensor  # from the whole model's answers, nats
    probability: Tensor  # that the whole model's likeliest answer loses
    loss: Tensor | None  # what it rises by, nats, batches weighed by their answers; None unless all have labels

    @property
    def figure(self) -> HeadMap:
        what = "How far the model's answers, as probabilities, move where one head hands over something else."
        top = float(self.divergence.nan_to_num(0.0).max())
        return HeadMap(
            "importance", "Importance of heads", what, range(len(self.divergence)), self.divergence, "nats", 0.0, top
        )

    @asks
    def top(self, count: int) -> tuple[Head, ...]:
        """The heads without which the answers move furthest, as `ablate` takes them."""
        require_count("top()", count)
        return strongest(self.divergence, count)

    def __repr__(self) -> str:
        rows = ["answers without one head: divergence, what the likeliest loses" + (", loss" * (self.loss is not None))]
        for layer, head in self.top(8):
            told = f"  {self.divergence[layer, head]:.4f} nats, {self.probability[layer, head]:+7.2%}"
            told += "" if self.loss is None else f", {self.loss[layer, head]:+.4f}"
            rows.append(f"{told}  {head_name(layer, head)}")
        return "\n".join(rows)


@torch.no_grad()
@asks
def head_importance(
    model: nn.Module | Loaded,
    batches: Iterable[Mapping[str, Any]],
    *,
    mean: Any = None,
    tokenizer: Tokenizer | None = None,
    progress: Report | None = None,
    **how: Any,
) -> HeadImportance:
    """How much the answers of a model hang on each of its heads: each is taken out alone, in a forward of its own.

    Batches hold what the model is called with, by name; with labels they tell the loss too. `mean` is as in `ablate`,
    zeros without it. What heads do together is not seen: of two that do the same neither seems to matter.
    """
    given = model if isinstance(model, Loaded) else Loaded(model, None, "")
    found: list[Tensor] = []
    counts: dict[int, int] = {}
    rows = 0
    with still(given.model), warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveWarning)  # a head may hand over nothing
        for number, batch in enumerate(named("head_importance()", batches)):
            inputs = suiting("head_importance()", "batches", given.model, batch)
            with attach(given.model, _Means(), **how) as run:
                whole, loss = _answers(run, inputs)
                now = {layer: len(stat.value) for layer, stat in run[_Means()].items()}
            if not counts:
                counts, what = now, _instead("head_importance()", given, mean, tokenizer, list(now), how)
            sums = torch.full((3, max(counts) + 1, max(counts.values())), float("nan"), dtype=torch.float64)
            for row, (layer, heads) in enumerate(counts.items()):
                for head in range(heads):
                    with attach(given.model, what.on(layer, head), **how) as run:
                        without, other = _answers(run, inputs)
                    sums[:, layer, head] = torch.stack([*_moved(whole, without), (other - loss) * len(whole)])
                if progress is not None:
                    progress(Progress("layers", row + 1, len(counts), f"batch {number + 1}"))
            found.append(sums)
            rows += len(whole)
    divergence, probability, rise = torch.stack(found).sum(0) / rows
    return HeadImportance(divergence, probability, None if bool(rise.isnan().all()) else rise)


def _answers(run: Run, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each answer that is no padding's, `[answers v]`, and the loss; nan without labels."""
    output = run(**inputs)
    logits, loss = (output, None) if isinstance(output, Tensor) else (_named(output, x) for x in ("logits", "loss"))
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise RefusedModel(f"{type(run.model).__name__} gives no logits, of which the importance of heads is told")
    if logits.shape[-1] < 2:
        rule = "one number, and the importance of heads is told of answers that are chosen among several"
        raise RefusedModel(f"{type(run.model).__name__} gives {rule}")
    written = getattr(getattr(run.model, "config", None), "is_encoder_decoder", False)
    text = inputs.get("decoder_attention_mask" if written else "attention_mask")
    if isinstance(text, Tensor) and text.shape == logits.shape[:-1]:
        logits = logits[text.bool()]
    if not logits.numel():
        rule = "must hold a token that is no padding"
        raise FieldError("head_importance()", "batches", "one without answers", rule, [{"input_ids": "..."}])
    if loss is None:
        loss = torch.tensor(float("nan"))
    elif not bool(loss.isfinite()):
        rule = "must have labels that count, for which the model gives a number"
        raise FieldError("head_importance()", "batches", float(loss), rule, [{"input_ids": "...", "labels": "..."}])
    return logits.flatten(0, -2).double().log_softmax(-1), loss.double().cpu()


def _named(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _moved(whole: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """The divergences of all answers, and what the probabilities of the likeliest lose, added up."""
    known = whole.exp()
    terms = torch.where(known > 0, known * (whole - without), 0.0)
    best = whole.argmax(-1, keepdim=True)
    lost = known.gather(-1, best) - without.gather(-1, best).exp()
    return terms.sum().cpu(), lost.sum().cpu()
