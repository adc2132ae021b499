"""All that an author of a method needs: `from heedful.authoring import Call, Method, Paper, Site, at`."""

from __future__ import annotations

from heedful.core.call import Call, Entries, Kept, Phase
from heedful.core.errors import FieldError, SiteError
from heedful.core.figures import Curves, Finding, Grid, HeadMap, Intervals, Listing, Role, Scatter, Told
from heedful.core.fitted import Fitted
from heedful.core.kinds import Decode, HeadWeights, Prompt, Reader, Surgery, Tokens
from heedful.core.mask import Causal, First, Mask, Where, Window
from heedful.core.method import Bench, Entry, Layer, Method, Part, Readings, Trial
from heedful.core.paper import Paper
from heedful.core.regions import Region
from heedful.core.rules import Rule
from heedful.core.shift import Shift, shifts
from heedful.core.sites import Site, at, penalises, reads
from heedful.core.stack import Stack
from heedful.core.stats import Cat, Histogram, Max, Mean, Statistic, Sum, TopK
from heedful.core.summary import Summary, sums

__all__ = [
    "Bench", "Call", "Cat", "Causal", "Curves", "Decode", "Entries", "Entry", "FieldError", "Finding", "First",
    "Fitted", "Grid", "HeadMap", "HeadWeights", "Histogram", "Intervals", "Kept", "Layer", "Listing", "Mask", "Max",
    "Mean", "Method", "Paper", "Part", "Phase", "Prompt", "Reader", "Readings", "Region", "Role", "Rule", "Scatter",
    "Shift", "Site", "SiteError", "Stack", "Statistic", "Sum", "Summary", "Surgery", "Tokens", "Told", "TopK",
    "Trial", "Where", "Window", "at", "penalises", "reads", "shifts", "sums",
]  # fmt: skip
