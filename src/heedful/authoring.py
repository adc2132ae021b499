"""All that an author of a method needs: `from heedful.authoring import Call, Method, Paper, Site, at`."""

from __future__ import annotations

from heedful.core.call import CachedKV, Call, Kept, Merged, Phase
from heedful.core.entry import CatalogueEntry, FitContext, Layer, Probe, Readings
from heedful.core.errors import FieldError, SiteError
from heedful.core.figures import Curves, Description, Finding, Grid, HeadMap, Intervals, Listing, Role, Scatter
from heedful.core.fitted import Fitted
from heedful.core.kinds.conversion import Conversion
from heedful.core.kinds.decode import Decode, Read
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.kinds.weights import HeadWeights, Surgery, Vocabulary, Weights
from heedful.core.mask import Causal, First, Mask, Where, Window
from heedful.core.method import Method, Part, Stack
from heedful.core.packed import Packed, Packing
from heedful.core.paper import Paper
from heedful.core.ranges import (
    Layers,
    NonNegativeFloat,
    NonNegativeInt,
    OddInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    ProperShare,
    RoleName,
    Share,
    ShareBelowOne,
)
from heedful.core.regions import Region
from heedful.core.reweight import Reweight, reweights
from heedful.core.rules import Rule
from heedful.core.sites import Site, adds, adds_by_distance, at, penalises, reads
from heedful.core.state import ByIndex, Until
from heedful.core.stats import Cat, Histogram, Max, Mean, Statistic, Sum, TopK
from heedful.core.summary import Summary, sums
from heedful.core.weighing import Weighing, weighs
from heedful.kit.scored_cache import ScoredCache

__all__ = [
    "ByIndex", "CachedKV", "Call", "Cat", "CatalogueEntry", "Causal", "Conversion", "Curves", "Decode",
    "Description", "FieldError", "Finding", "First", "FitContext", "Fitted", "Grid", "HeadMap", "HeadWeights",
    "Histogram", "Intervals", "Kept", "Layer", "Layers", "Listing", "Mask", "Max", "Mean", "Merged", "Method",
    "NonNegativeFloat", "NonNegativeInt", "OddInt", "Packed", "Packing", "Paper", "Part", "Phase", "PositiveFloat",
    "PositiveInt", "PositiveShare", "Probe", "Prompt", "ProperShare", "Read", "Reader", "Readings", "Region",
    "Reweight", "Role", "RoleName", "Rule", "Scatter", "ScoredCache", "Share", "ShareBelowOne", "Site", "SiteError",
    "Stack", "Statistic", "Sum", "Summary", "Surgery", "Tokens", "TopK", "Until", "Vocabulary", "Weighing",
    "Weights", "Where", "Window", "adds", "adds_by_distance", "at", "penalises", "reads", "reweights", "sums",
    "weighs",
]  # fmt: skip
