"""What a run must learn or change around an attention call: module hooks, added and taken away together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from heedful.adapters.arguments import as_told, by_name, own_places
from heedful.adapters.bound import Bound
from heedful.adapters.carried import shelf_of
from heedful.adapters.forwards import Forwards
from heedful.adapters.hooked import Hooked
from heedful.adapters.kvcache import HeldLayer, hold, own_cache, seen, shrinking
from heedful.adapters.layers import block_of
from heedful.adapters.lazymask import LazyMask
from heedful.adapters.merging import came_to, part_behind
from heedful.adapters.projections import output_module, projections
from heedful.adapters.replacing import NOTHING, ROTATED, UNROTATED, Spared, shares_keys, takes_up, unrotated
from heedful.adapters.taking import other_of, put, stream_of
from heedful.core.call import Call, Phase
from heedful.core.errors import NotEntered, RefusedModel, SiteError
from heedful.core.positions import Positions
from heedful.core.sites import Site
from heedful.core.values import replace
from heedful.engine.again import stand_around
from heedful.engine.attend import replaced
from heedful.engine.attention_call import AttentionCall
from heedful.engine.plan import NO_STEPS, Plan
from heedful.engine.run import Run
from heedful.engine.stages import stage


def _cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache that a module is handed; of an encoder and decoder's two that of self attention."""
    for x in (*kwargs.values(), *args):
        if isinstance(x, Cache):
            return own_cache(x)
    return None


def _serve_no_more(bound: Bound) -> None:
    """Let a module's layer of the cache be read by the run alone again, where an error came before its update."""
    if bound.held is not None:
        bound.held.served = False
    shelf_of(bound.cache).served = None


@dataclass(eq=False)
class Hooks:
    """The hooks of one run in one model."""

    run: Run
    layers: int  # how many are served
    acting: bool = False  # a run computes inside a module, which is no work of the module's own
    looking: bool = False  # a module is looked at, in which the run has no part
    forwards: Forwards = field(init=False)
    _hooked: Hooked = field(default_factory=Hooked)

    def __post_init__(self) -> None:
        self.forwards = Forwards(self.run)

    def remove(self) -> None:
        self._hooked.remove()

    @contextmanager
    def acts(self) -> Iterator[None]:
        """A `with` in which the run computes, and not the module that is under way."""
        before, self.acting = self.acting, True
        try:
            yield
        finally:
            self.acting = before

    def around_forwards(self, parts: Mapping[str, nn.Module]) -> None:
        """Know where a forward of the whole begins and ends, and one of a model in it; the whole is named ''."""
        self.forwards.of(parts, self._hooked)

    # one attention module

    def around(self, bound: Bound) -> None:
        """See what goes into a module, edit HIDDEN, and make sure that its attention came to us."""
        known = {"layer": bound.number or 0, "depth": self.layers, "name": bound.name}
        bound.outline = replace(bound.outline, **known, lowest=bound.lowest, highest=bound.highest)
        bound.steps = NO_STEPS if bound.number is None else Plan(self.run.stack.steps(bound.number))
        goes_on = self.run.stack.touches(Site.BLOCK, Site.OUTPUT, Site.RESIDUAL)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.looking:
                return None
            bound.called = not bound.server.is_layer(bound, args, kwargs)
            return None if bound.called else self._enter(bound, args, kwargs)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if self.looking:
                return
            failed = output is None and sys.exc_info()[0] is not None
            if failed:
                _serve_no_more(bound)
            bound.hidden = bound.other = bound.cache = bound.held = bound.rotary = bound.joint = bound.merges = None
            if not goes_on:
                bound.call = None  # it holds the hidden states
            if not bound.called and not failed:
                raise NotEntered(
                    f"{bound.name} ({bound.kind}) ran, but its attention did not pass through heedful; the answer "
                    "would silently be the unedited model's. Was it compiled or replaced since?"
                )

        self._hooked.before(bound.module, before)
        self._hooked.after(bound.module, after, always_call=True)

    def _enter(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        taking, hidden = bound.taking, stream_of(args, kwargs)
        bound.hidden = None if hidden is None else taking.turned(hidden)
        told = by_name(bound.module, args, kwargs)
        rotary = told.get("position_embeddings")
        bound.rotary = rotary if isinstance(rotary, tuple) and len(rotary) == 2 else None
        bound.cache = _cache_among(args, kwargs)
        bound.other = other_of(told, hidden)
        bound.cross = bound.other is not None
        if self.run.stack.merges:
            bound.merges = came_to(self.run, bound, told, hidden)
        if bound.number is None:
            return None
        if self.forwards.asks_gradients:
            self._stand_around(bound.name)
        bound.held = None if bound.cache is None or bound.cross else self._reach(bound, bound.cache)
        if not bound.steps.steps:
            return None
        self.run.state.begin(bound.number, shelf_of(bound.cache), bound.module)
        if not (early := bound.steps.early):
            return None
        if bound.hidden is None or bound.hidden.ndim not in (2, 3):
            places = " and ".join(sorted(site.name for site in early))
            raise RefusedModel(f"{bound.name} ({bound.kind}) is not handed hidden states [b n e], so {places} has none")
        flat = bound.hidden.ndim == 2  # [n e], of images whose patches stand in one row
        hidden = bound.hidden[None] if flat else bound.hidden
        cross = bound.cross and not bound.outside
        call = self._outline(bound, hidden, told.get("attention_mask"), bound.cache, cross)
        plan = self.run.state.plan(call, *early)
        args, kwargs = self._without_what_is_replaced(bound, plan, args, kwargs)
        if Site.HIDDEN not in early:
            return args, kwargs
        hidden = stage(Site.HIDDEN, hidden, AttentionCall(plan, self.run.state, call), call)
        bound.hidden = hidden[0] if flat else hidden
        self.run.state.close_call(plan, call)
        return put(taking.turned(bound.hidden), args, kwargs)

    def _reach(self, bound: Bound, cache: Cache) -> HeldLayer | None:
        """Find a module's layer of the cache, and let it hold fewer entries than it has seen, if some may be dropped.

        Its next update may hand out heads of unlike length: the attention that follows is ours.
        """
        number = getattr(bound.module, "layer_idx", None)
        held = shrinking(cache, number)
        if Site.CACHE in bound.steps.acts and (held is None or bound.outside):
            if bound.outside:
                raise RefusedModel(
                    f"a CACHE edit cannot act in {bound.name}: {bound.kind} computes attention by itself, and what it "
                    "does with its cache is not known; restrict the method to other layers with .on(layers=[...])"
                )
            if number is None:
                raise RefusedModel(f"a CACHE edit cannot act in {bound.name}: the module does not tell its cache layer")
            held = hold(cache, number, bound.name)
        if held is not None:
            held.served = True
        return held

    def _without_what_is_replaced(
        self, bound: Bound, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A module's arguments as a method that replaces it wants them; what it need not compute is left out."""
        steps = (*plan.at(Site.MIX), *plan.at(Site.BLOCK))
        bound.spared = frozenset()
        if any(step.edit.before_rotary for step in steps) and (still := unrotated(bound, args, kwargs)) is not None:
            if not takes_up(bound, UNROTATED):
                raise SiteError(f"{bound.name}: {ROTATED}")
            args, kwargs = still
        for step in plan.at(Site.BLOCK):
            bound.spared = frozenset("o" if step.edit.before_rotary else "qo")
            # a later call that is not replaced, and another layer, may read the keys of one that is
            unread = (step.always or bound.cache is None) and not shares_keys(bound.module)
            if unread and not step.edit.before_rotary and takes_up(bound, NOTHING):
                bound.spared = frozenset("qkvo")
        return args, kwargs

    def spare(self, model: nn.Module, bound: Bound) -> None:
        """Let the projections of a module whose block is replaced do nothing that nobody reads."""
        try:
            found = projections(model, bound.name, bound.number or 0)
        except RefusedModel:
            return  # there they do it for nothing
        letters: dict[nn.Module, frozenset[str]] = {}
        for letter in "qkvo":
            module = found.module(letter)
            letters[module] = letters.get(module, frozenset()) | {letter}
        for module, mine in letters.items():
            spared = Spared(bound, mine)
            self._hooked.before(module, spared.before)
            self._hooked.after(module, spared.after)

    def _stand_around(self, name: str) -> None:
        self.run.state.now.blind_layer = stand_around(self.run, name, whole=False)

    def _outline(self, bound: Bound, hidden: Tensor, mask: Any, cache: Cache | None, cross: bool = False) -> Call:
        """What can be known of a call before its queries are."""
        n = hidden.shape[1]
        if bound.merges is not None and not cross:
            queries = keys = bound.merges.places
        elif isinstance(mask, LazyMask):
            queries, keys = mask.spec.queries, mask.spec.keys
        else:
            start = 0 if cross else seen(cache, getattr(bound.module, "layer_idx", None))
            told = None if cross or mask is None else self.forwards.told(bound)
            row = Positions.row(start, n, hidden.device), Positions.row(0, start + n, hidden.device)
            queries, keys = as_told(told, n, start + n, len(hidden)) or row
        if cross:
            queries = own_places(bound, self.run.state.now.queries, len(hidden), n, hidden.device)
        phase = Phase.of(queries, cross and cache is not None)
        return replace(
            bound.outline, queries=queries, keys=keys, phase=phase, denoising=self.run.state.denoising, cross=cross,
            training=bound.module.training, ids=self.forwards.ids(bound, len(hidden), n),
            roles=self.forwards.roles(bound, len(keys)), hidden=hidden, forward=self.run.state.now.number,
            batch=len(hidden), sizes=bound.sizes,
        )  # fmt: skip

    # the layers of one list

    def stream(self, model: nn.Module, served: list[Bound]) -> None:
        """Act in the stream before the first layer and after each, where the stack does."""
        if self.run.stack.touches(Site.EMBEDDING):
            self._before_blocks(model, served)
        if self.run.stack.touches(Site.RESIDUAL):
            self._after_blocks(model, served)

    def _acts_at(self, bound: Bound, *sites: Site) -> bool:
        """Whether a step is for this layer, which `.on(layers=...)` may leave out."""
        return any(step.edit.site in sites for step in self.run.stack.steps(bound.number))

    def _in_lists(self, site: Site, model: nn.Module, served: list[Bound]) -> list[tuple[str, Bound]]:
        """The layers that stand in a list, each with its item's name; what pools a stream behind one stands in none."""
        found = [(name, bound) for bound in served if (name := block_of(model, bound.name)) is not None]
        acting = [bound for bound in served if self._acts_at(bound, site)]
        if acting and not any(bound in acting for _, bound in found):
            raise RefusedModel(f"no {site.name} edit can act in {acting[0].name}: it stands in no list of layers")
        return found

    def _before_blocks(self, model: nn.Module, served: list[Bound]) -> None:
        """Edit and read EMBEDDING: what enters the first layer of each list of layers."""
        first: dict[str, Bound] = {}
        for name, bound in self._in_lists(Site.EMBEDDING, model, served):
            if name.rpartition(".")[2] == "0":
                first.setdefault(name, bound)
        if not first:
            raise RefusedModel("an EMBEDDING edit cannot act: no first layer of a list of layers is served")
        for name, bound in first.items():
            self._before_block(model, name, bound)

    def _before_block(self, model: nn.Module, name: str, bound: Bound) -> None:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            taking, given = bound.taking, stream_of(args, kwargs)
            if given is None or given.ndim != 3:
                raise RefusedModel(f"an EMBEDDING edit cannot act before {name}: it is not handed [b n e]")
            stream = taking.turned(given)
            if self.forwards.asks_gradients:
                self._stand_around(name)
            mask = by_name(block, args, kwargs).get("attention_mask")
            call = self._outline(bound, stream, mask, _cache_among(args, kwargs))
            self.run.state.begin_early(call.layer)
            job = AttentionCall(self.run.state.plan(call, Site.EMBEDDING), self.run.state, call)
            new = stage(Site.EMBEDDING, stream, job, call)
            self.run.state.close_call(job.plan, call)
            return put(taking.turned(new), args, kwargs)

        self._hooked.before(model.get_submodule(name), before)

    # its output projection

    def after_projection(self, model: nn.Module, bound: Bound) -> None:
        """Edit and read OUTPUT, after what replaces the BLOCK."""
        found = bound.output or output_module(model, bound.name)
        if found is None:
            if not self._acts_at(bound, Site.OUTPUT, Site.BLOCK):
                return
            raise RefusedModel(
                f"an OUTPUT or BLOCK edit cannot act in {bound.name}: heedful finds no output projection there"
            )

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            if bound.call is None or self.looking:
                return None
            call = bound.call
            if not self.run.stack.touches(Site.RESIDUAL):
                bound.call = None
            return self._acted(Site.OUTPUT, bound, bound.name, call, output)

        self._hooked.after(found, after)

    # the layer that it stands in

    def _after_blocks(self, model: nn.Module, served: list[Bound]) -> None:
        """Edit and read RESIDUAL; of several attentions in one layer the last one answers for it."""
        blocks = dict(self._in_lists(Site.RESIDUAL, model, served))
        if self.run.stack.merges:
            part_behind(self._hooked, self.run, model, blocks)
        for name, bound in blocks.items():
            self._after_block(model, name, bound)

    def _after_block(self, model: nn.Module, name: str, bound: Bound) -> None:
        def after(block: nn.Module, args: Any, output: Any) -> Any:
            call, bound.call = bound.call, None
            if call is None or not isinstance(output, Tensor | tuple):
                return None
            return self._acted(Site.RESIDUAL, bound, name, call, output)

        self._hooked.after(model.get_submodule(name), after, prepend=True)  # before what collects hidden states

    # what leaves one of them

    def _acted(self, site: Site, bound: Bound, name: str, call: Call, output: Any) -> Any:
        """What a module gives, `[b n e]` alone or first of several, as the steps of a site leave it."""
        given = output[0] if isinstance(output, tuple) else output
        n, turned = len(call.queries), bound.taking.turned
        if not isinstance(given, Tensor) or given.shape[:-1].numel() % n:
            raise RefusedModel(f"{site.name} cannot be acted on in {name}: it does not give [b n e] for {n} tokens")
        job = AttentionCall(self.run.state.plan(call), self.run.state, call)
        rows = turned(given)
        new = rows.reshape(-1, n, rows.shape[-1])
        with self.acts():
            if site is Site.OUTPUT and (steps := job.plan.at(Site.BLOCK)):
                new = replaced(steps[0], job, call, new)
            new = stage(site, new, job, call)
        self.run.state.close_call(job.plan, call)
        if new.shape[1] == n:
            new = new.reshape(rows.shape)
        elif rows.ndim != 3 or rows.shape[1] != n:
            raise RefusedModel(f"{name} gives its tokens in other rows than it attends in, so that none can be merged")
        new = turned(new)
        return (new, *output[1:]) if isinstance(output, tuple) else new
