"""Tokens that methods merge between layers: what later layers are handed, and where they part again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from heedful.adapters.bound import Bound
from heedful.adapters.hooked import Hooked, Standing
from heedful.adapters.layers import list_of
from heedful.adapters.lazymask import LazyMask
from heedful.core.errors import RefusedModel, SiteError
from heedful.core.regions import Marks, PerText, Region
from heedful.engine.merging import Merges
from heedful.engine.run import Run

ANGLES = ("position_embeddings", "rope", "rotary_pos_emb", "rope_emb", "freqs_cis")


def came_to(run: Run, bound: Bound, told: Mapping[str, Any], stream: Tensor | None) -> Merges | None:
    """What has become of a layer's tokens in those before it; a layer that cannot do with fewer is refused."""
    if not run.stack.merges:
        return None
    known = run.state.now.merges
    if bound.number is None:
        if any(list_of(run.layer_names[first]) == list_of(bound.name) for first in known):
            raise RefusedModel(f"{bound.name} is not served, and tokens were merged before it; serve the whole list")
        return None
    if bound.cache is not None and (merging := bound.steps.merging):
        why = f"{merging[0]}: {bound.name} reads into a cache, which would hold every token"
        raise RefusedModel(f"{why}; use_cache=False")
    merges = known.get(bound.lowest)
    if merges is None:
        return None
    if bound.number <= merges.layer:
        raise _never_parted(run, merges)
    tokens, own = merges.to.shape[1], None if stream is None else stream.shape
    for name, given in told.items():
        if given is not None and name in ANGLES:  # as many as there were patches
            raise RefusedModel(
                f"{bound.name} ({bound.kind}) is handed {name!r} for each token; merge none in this model"
            )
        for x in given if isinstance(given, tuple | list) else (given,):
            plain = isinstance(x, Tensor) and not isinstance(x, LazyMask)
            if plain and x.shape != own and tokens in x.shape:
                raise RefusedModel(
                    f"{bound.name} ({bound.kind}) is handed {name!r} {tuple(x.shape)} of {tokens} tokens, and "
                    f"{len(merges.places)} are left of them; merge none in this model"
                )
    return merges


def require_no_table(bound: Bound, *tables: Tensor | None) -> None:
    """Refuse what a layer makes of itself for pairs of tokens, such as biases of how far apart patches stand."""
    if bound.merges is not None and not bound.cross and any(table is not None for table in tables):
        raise RefusedModel(
            f"{bound.name} ({bound.kind}) has a mask or a bias of its own for pairs of tokens, of which "
            f"{len(bound.merges.places)} are left; merge none in this model"
        )


def without_grids(roles: Marks) -> Marks:
    """The roles of fewer tokens, which fill no grid any more."""

    def plain(spans: Any) -> Any:
        return PerText(map(Region, spans)) if isinstance(spans, PerText) else Region(spans)

    return {name: plain(spans) for name, spans in roles.items()}


def part_behind(hooked: Hooked, run: Run, model: nn.Module, blocks: Mapping[str, Bound]) -> None:
    """Give merged tokens back behind the last layer of each list, for whatever comes after it."""
    for home, bound in {name.rpartition(".")[0]: bound for name, bound in blocks.items()}.items():
        *others, last = vars(model.get_submodule(home))["_modules"].values()
        if last in others:
            raise RefusedModel(
                f"{home} ends with a layer that it runs before too, behind which merged tokens would part"
            )
        _require_no_maps(hooked, model, home, len(others))
        _part(hooked, run, last, bound)


def _require_no_maps(hooked: Hooked, model: nn.Module, home: str, last: int) -> None:
    """Refuse what lays the streams of inner layers out as maps, which fewer tokens would fill by other numbers."""
    parts = home.split(".")
    for module in [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]:
        wanted = getattr(module, "out_indices", None)
        if isinstance(wanted, list | tuple):
            _require_last(module, wanted, len(getattr(module, "stage_names", None) or range(last + 1)) - 1)
        given = getattr(type(module), _Intermediates.NAME, None)
        if given is not None and "indices" in signature(given).parameters:
            hooked.stand(_Intermediates(module, last))


def _require_last(module: nn.Module, wanted: Iterable[int], last: int) -> None:
    if any(number not in (last, -1) for number in wanted):
        raise RefusedModel(
            f"{type(module).__name__} makes maps of the streams behind its layers {list(wanted)}, and where tokens "
            f"are merged inner ones have fewer; let it give that of the last alone, {[last]}"
        )


@dataclass(eq=False)
class _Intermediates(Standing):
    """Stands for how timm and open_clip give streams that they are asked for: all, the last few, or some by number."""

    NAME = "forward_intermediates"
    last: int

    def __call__(self, *args: Any, **more: Any) -> Any:
        given = signature(getattr(type(self.module), self.NAME)).bind(self.module, *args, **more)
        asked, layers = given.arguments.get("indices"), range(self.last + 1)
        wanted = layers[-asked:] if isinstance(asked, int) else layers if asked is None else asked
        _require_last(self.module, wanted, self.last)
        return self.own(*args, **more)


def _part(hooked: Hooked, run: Run, last: nn.Module, bound: Bound) -> None:
    def after(_: nn.Module, args: Any, output: Any) -> Any:
        merges = run.state.now.merges.pop(bound.lowest, None)
        if merges is None:
            return None
        turned = bound.taking.turned
        stream = turned(merges.parted(turned(output[0] if isinstance(output, tuple) else output)))
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hooked.after(last, after, prepend=True)  # and so behind the edits of the layer, whose hooks come later


def require_parted(run: Run) -> None:
    """Refuse a forward that left a list of layers early, with fewer tokens than it is known by."""
    for merges in run.state.now.merges.values():
        raise _never_parted(run, merges)


def _never_parted(run: Run, merges: Merges) -> SiteError:
    name = run.layer_names[merges.layer]
    return SiteError(f"tokens were merged behind {name}, and the last layer of its list, where they part, never ran")
