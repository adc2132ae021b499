"""Named comparisons: which methods are asked which tasks, as a paper has it."""

from __future__ import annotations

from dataclasses import dataclass

from heedful.core.errors import CatalogueError, nearest
from heedful.core.paper import Paper


@dataclass(frozen=True)
class Preset:
    """Methods and tasks as they are spelled on the command line; either may be replaced by one's own."""

    name: str
    about: str
    methods: str
    tasks: str
    paper: Paper


SHARES = (0.5, 0.25)  # budgets that all methods of the preset have alike

FRONTIER = Preset(
    "sparse-frontier",
    "Sparse attention without training at equal budgets, in the cache, in decoding and in prefill, by each one's worst "
    "task.",
    ",".join(
        [
            *(f"{name}(budget={share})" for share in SHARES for name in ("snapkv", "adakv", "leoam")),
            *(f"tokenselect(budget={share},sinks=4,window=16,chunk=16)" for share in SHARES),
            "sampleattention",
            "flexprefill(least=32)",
        ]
    ),
    "needle,needle_many,multi_query,documents,loss",
    Paper(
        "P206",
        "The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs",
        "Piotr Nawrot, Robert Li, Renjie Huang, Sebastian Ruder, Kelly Marchisio, Edoardo M. Ponti",
        2025,
        "2504.17768",
        differs=(
            "Their tasks are retrieval, several steps and summing up, in made and natural texts of 16,000 to 128,000 "
            "tokens; ours are short, and none sums up. `--tasks 'needle(length=4096)'` asks for longer ones.",
            "Their patterns are vertical and slash, blocks, FlexPrefill, SnapKV, Ada-SnapKV and Quest; in its place, "
            "which is not in the catalogue, LeoAM bounds chunks of keys as it does.",
            "Budgets of prefill are not set but come out, and are told as pairs; theirs are searched for.",
            "Losses are in nats of the right answer, theirs relative to the score without sparsity.",
            "Large sparse models against small dense ones at equal operations want several models of a family: compare "
            "each, and lay their tables side by side.",
        ),
    ),
)

PRESETS = {preset.name: preset for preset in (FRONTIER,)}


def preset(name: str) -> Preset:
    """A preset by its name."""
    if name not in PRESETS:
        raise CatalogueError(f"no preset named {name!r}.{nearest(name, PRESETS)} Known: {', '.join(PRESETS)}")
    return PRESETS[name]
