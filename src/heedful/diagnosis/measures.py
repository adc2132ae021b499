"""The measures of a default diagnosis, in the order in which the page shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

from heedful.catalogue import entries, entry_from
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import Measure, Weights
from heedful.core.method import Method, Part, method_of
from heedful.methods.observe.attention_profile import AttentionProfile
from heedful.methods.observe.induction_heads import InductionHeads
from heedful.methods.observe.massive_qk import MassiveQK
from heedful.methods.observe.max_activations import MaxActivations
from heedful.methods.observe.modality_share import ModalityShare
from heedful.methods.observe.offset_local_heads import OffsetLocalHeads
from heedful.methods.observe.parallel_to_first import ParallelToFirst
from heedful.methods.observe.position_influence import PositionInfluence
from heedful.methods.observe.positional_heads import PositionalHeads
from heedful.methods.observe.retrieval_heads import RetrievalHeads
from heedful.methods.observe.secondary_sinks import SecondarySinks
from heedful.methods.observe.sink_rate import SinkRate
from heedful.methods.observe.systematic_outliers import SystematicOutliers
from heedful.methods.observe.weibull_weights import WeibullWeights

WEIGHTS = "weights"  # stands for the reader where a measure looks at weights
DEFAULT: tuple[Measure, ...] = (
    SinkRate(places=64),  # where heads park; further on the mean over heads is all that is shown
    SecondarySinks(),
    AttentionProfile(),
    # two prompts for what these read by themselves, fewer tokens than by default: reading the text is to cost the most
    InductionHeads(period=48, repeats=3),
    RetrievalHeads(together=True),
    PositionalHeads(),
    PositionInfluence(),
    MaxActivations(),
    ParallelToFirst(),
    SystematicOutliers(),
    MassiveQK(),
    WeibullWeights(sample=50_000),  # shapes within 0.02 of those of all weights
)
PICTURED: tuple[Measure, ...] = (  # of a model that reads images
    OffsetLocalHeads(),
    ModalityShare(("cls", "register", "border"), "middle"),
    MaxActivations(),
    SystematicOutliers(),
    MassiveQK(),
    WeibullWeights(sample=50_000),
)
# of a model that hears; outliers are matched from layer to layer, and here not all layers have the same tokens
HEARD: tuple[Measure, ...] = (
    SinkRate(places=64),
    AttentionProfile(),
    MaxActivations(),
    MassiveQK(),
    WeibullWeights(sample=50_000),
)


def chosen(
    measures: Iterable[Measure | str] | Measure | str | None, default: tuple[Measure, ...] = DEFAULT
) -> tuple[Measure, ...]:
    """The measures asked for, each once; the default ones where none are."""
    if measures is None:
        return default
    requested = [measures] if isinstance(measures, str | Measure) else list(measures)
    parts = tuple(dict.fromkeys(entry_from(x) if isinstance(x, str) else x for x in requested))
    for part in parts:
        if isinstance(part, Weights):
            continue
        if not (isinstance(part, Part) and all(edit.reads for edit in method_of(part).edits)):
            kinds = entries().values()
            known = [k.__name__ for k in kinds if issubclass(k, Method) and all(edit.reads for edit in k.edits)]
            known += [k.__name__ for k in kinds if issubclass(k, Weights)]
            rule = f"must be methods that read and edit nothing: {', '.join(known)}"
            raise FieldError("diagnose()", "measures", part, rule, [SinkRate.__name__])
    if not parts:
        raise FieldError("diagnose()", "measures", measures, "names none", [type(part).__name__ for part in DEFAULT])
    return parts  # type: ignore[return-value]


def readers(part: Measure) -> list[str]:
    """What a measure's statistics are named by."""
    return [WEIGHTS] if isinstance(part, Weights) else [e.name for e in method_of(part).edits if e.reads]


def reads_text(part: Measure) -> TypeGuard[Part]:
    """Whether a measure is taken on the user's text."""
    return not isinstance(part, Weights) and not makes_trials(part)


def makes_trials(part: Measure) -> TypeGuard[Part]:
    """Whether a measure is taken on prompts of its own."""
    return isinstance(part, Part) and type(method_of(part)).probes is not Method.probes
