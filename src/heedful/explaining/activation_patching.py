"""Which heads an answer needs: each head's output put from one run into another, everywhere or along one path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heedful.adapters.wrapped import device_of
from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import Code, FieldError, InactiveWarning
from heedful.core.figures import Head, HeadMap, head_name
from heedful.core.fitted import Fitted
from heedful.core.kinds.loaded import Tokenizer
from heedful.core.method import Method, Part, Stack, as_stack
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat
from heedful.explaining.aim import fed_each, following, pairs, require_count, strongest
from heedful.explaining.drawn import Told
from heedful.explaining.site_values import keeping, require_once
from heedful.methods.explain.patch import Patch, patched
from heedful.models import Loaded

Metric = Callable[[Tensor], Tensor]  # logits [b n v] -> one number a text [b], higher where the answer is the clean one
# a text or several, as strings or token ids [b n]; or all that a model takes, "roles" beside it
Inputs = str | Tensor | Mapping[str, Any] | Sequence[str] | Sequence[int] | Sequence[Tensor | Sequence[int]]
METRIC = Code("lambda logits: logits[:, -1, right] - logits[:, -1, wrong]")
SIDES = {"q": Site.QUERY, "k": Site.KEY, "v": Site.VALUE}


@dataclass(frozen=True, eq=False)
class HeadEffects(Told):
    """How much of the difference between two prompts hangs on each head alone."""

    share: Tensor  # [layers h]: 1 is all of the difference; nan where a head was not tried
    clean: float  # the metric's mean on the clean prompts
    corrupt: float

    @asks
    def top(self, count: int) -> tuple[Head, ...]:
        """The heads with the largest effects, whatever their sign, largest first; none that was not tried."""
        require_count("HeadEffects.top()", count)
        return strongest(self.share, count)

    @property
    def _tried(self) -> int:
        return int((~self.share.isnan()).sum())

    @asks
    def overlap(self, other: HeadEffects, count: int) -> float:
        """The share of this one's top heads that are top heads of the other too; chance is count / heads."""
        if self.share.shape != other.share.shape:
            raise FieldError(
                "overlap()", "other", tuple(other.share.shape), "must be of the same model", self.share.shape
            )
        most = min(self._tried, other._tried)
        if not 1 <= count <= most:
            rule = f"must be from 1 to {most} heads, as many as both have tried"
            raise FieldError("overlap()", "count", count, rule, min(10, most))
        return len(set(self.top(count)) & set(other.top(count))) / count

    @property
    def figure(self) -> HeadMap:
        what = (
            "The share of the clean prompt's lead that this head's output alone carries; below 0 it works against it."
        )
        size = float(self.share.abs().nan_to_num(0.0).max())
        layers = range(len(self.share))
        return HeadMap("patching", "Effect of each head", what, layers, self.share, "score", -size, size)

    def __repr__(self) -> str:
        rows = [f"metric: clean {self.clean:.3f}, corrupt {self.corrupt:.3f}; heads with the largest effect:"]
        rows += [f"  {head_name(*head):>6} {float(self.share[head]):+.1%}" for head in self.top(10)]
        return "\n".join(rows)


@asks
def patching(  # noqa: PLR0913 - a verb's options, each by name
    model: nn.Module | Loaded,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    positions: tuple[int, ...] | None = None,
    layers: Iterable[int] | None = None,
    estimate: bool = False,
    under: Part | Stack | None = None,
    tokenizer: Tokenizer | None = None,
) -> HeadEffects:
    """Activation patching: run the corrupt prompts with one head's output from the clean ones, head by head.

    Prompts are a text or a list of them, of equally many tokens each, as strings or token ids `[b n]`; or all that a
    model takes, so that the corrupt ones may differ in a picture. What corrupts may also be a stack, `TokenNoise` say,
    which acts `under` the corrupt run alone and finds its spans by that one's "roles".

    A head's share is how far that alone brings the metric back. One forward of all prompts for each head; or, for an
    `estimate`, two forwards and a backward for all: each output's difference times the metric's gradient there, the
    first term of the same effect (attribution patching).
    """
    probe = _Probe(model, clean, corrupt, metric, layers, under, tokenizer)
    if positions is not None:
        positions, n = tuple(sorted(set(positions))), probe.clean["input_ids"].shape[1]
        if not positions or positions[0] < 0 or positions[-1] >= n:
            rule = f"must be one or more text positions from 0 to {n - 1}"
            raise FieldError("patching()", "positions", positions, rule, (n - 1,))
    values = probe.kept(probe.clean)
    if estimate:
        return probe.each(probe.first_order(values, positions))
    source = Patch(values, positions)

    def effect(head: Head) -> float:
        found = probe.score(probe.corrupt, probe.under | source.on(layers=head[0], heads=head[1]))
        return (found - probe.low) / (probe.high - probe.low)

    return probe.each(effect)


@asks
def path_patching(
    model: nn.Module | Loaded,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    receivers: Iterable[Head] = (),
    side: Literal["q", "k", "v"] = "q",
    layers: Iterable[int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> HeadEffects:
    """Path patching: one head's output from the corrupt prompts, seen by the `receivers` alone, in a clean run.

    Prompts are as in `patching`.

    All other heads hold what they had on the clean prompts, so that a sender reaches its receivers through the stream
    and MLPs only. Without receivers that is the logits. With them, it is their queries, keys or values (`side`): what
    they become is put into another clean run, two forwards for each head. A share is how much of the metric is lost.
    Where heads share keys and values, receivers of these are whole groups.
    """
    if side not in SIDES:
        raise FieldError("path_patching()", "side", side, "must be 'q', 'k' or 'v'", "q")
    probe = _Probe(model, clean, corrupt, metric, layers, tokenizer=tokenizer)
    heads_of, first = pairs("path_patching()", receivers, "receivers"), min(probe.requested)
    sizes = {size.number: size.heads for size in probe.sizes}
    known = all(heads[-1] < sizes.get(layer, 0) for layer, heads in heads_of.items())
    if not known or (heads_of and max(heads_of) <= first):
        rule = (
            f"must be (layer, head) pairs of the model's {len(sizes)} layers, one or more of them above layer {first}"
        )
        raise FieldError("path_patching()", "receivers", _as_pairs(heads_of), rule, [(len(sizes) - 1, 0)])
    if side != "q":
        _require_groups(probe.sizes, heads_of, side)
    before, after = (Patch(probe.kept(ids)) for ids in (probe.clean, probe.corrupt))

    def effect(head: Head) -> float:
        sender = Stack((before, after.on(layers=head[0], heads=head[1])))
        if heads_of:
            if head[0] >= max(heads_of):
                return float("nan")  # nothing of it reaches them
            seen = probe.kept(probe.clean, SIDES[side], sender, heads_of)
            put = _putting(SIDES[side])(seen)
            parts = [put.on(layers=layer, heads=heads) for layer, heads in heads_of.items() if layer > head[0]]
            sender = Stack(tuple(parts))
        found = probe.score(probe.clean, sender)
        return (probe.high - found) / (probe.high - probe.low)

    return probe.each(effect)


class _Probe:
    """A model, the layers whose heads are tried, two sets of prompts and what is measured on them."""

    def __init__(
        self,
        model: nn.Module | Loaded,
        clean: Inputs,
        corrupt: Inputs,
        metric: Metric,
        layers: Iterable[int] | None,
        under: Part | Stack | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        from heedful.adapters.choosing import adapter_for

        given = model if isinstance(model, Loaded) else Loaded(model, None, "")
        self.model, self.metric = given.model, metric
        self.under = as_stack(under)
        self.sizes = adapter_for(self.model, None).sizes()
        known = range(len(self.sizes))
        requested = list(known if layers is None else layers)
        if not requested or not all(isinstance(layer, int) and layer in known for layer in requested):
            raise FieldError(
                "patching()", "layers", requested, f"must be numbers of layers, and must lie below {len(known)}", [0]
            )
        self.requested = set(requested)
        device, words = device_of(self.model), tokenizer or given.tokenizer
        own, other = (_whole(self.model, name, x, words) for name, x in (("clean", clean), ("corrupt", corrupt)))
        self.roles = other.get("roles")
        self.clean, self.corrupt = (
            {name: x.to(device) for name, x in each.items() if isinstance(x, Tensor)} for each in (own, other)
        )
        ids, others = (inputs.get("input_ids") for inputs in (self.clean, self.corrupt))
        if ids is None or others is None or ids.ndim != 2 or ids.shape != others.shape:
            got, good = (None if x is None else tuple(x.shape) for x in (others, ids))
            raise FieldError("patching()", "corrupt", got, f"must be [b n] and of the shape of clean, {good}", good)
        for inputs in (self.clean, self.corrupt):
            _require_texts_apart(inputs)
        self.high, self.low = self.score(self.clean, Stack()), self.score(self.corrupt, self.under)
        if self.high == self.low:
            rule = f"is {self.high} on both, so there is nothing to bring back"
            raise FieldError("patching()", "metric", metric, rule, METRIC)

    @torch.no_grad()
    def score(self, inputs: Mapping[str, Tensor], what: Stack) -> float:
        """The metric's mean over the prompts, under a stack."""
        with still(self.model):
            if not what:
                logits = self.model(**inputs).logits
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", InactiveWarning)  # the prompts may be alike where a head looks
                    with attach(self.model, what, roles=self.roles) as run:
                        logits = run(**inputs).logits
        found, texts = self.metric(logits), len(inputs["input_ids"])
        if not isinstance(found, Tensor) or found.shape != (texts,):
            got = f"of the shape {list(found.shape)}" if isinstance(found, Tensor) else f"of {type(found).__name__}"
            rule = f"gave an answer {got}, and must give one number a text, of the shape [{texts}]"
            raise FieldError("patching()", "metric", self.metric, rule, METRIC)
        return float(found.double().mean())

    @torch.no_grad()
    def kept(
        self,
        inputs: Mapping[str, Tensor],
        site: Site = Site.HEAD_OUTPUT,
        under: Part | Stack | None = None,
        layers: Iterable[int] | None = None,
    ) -> Fitted:
        """What stands at a site of some layers, by layer and text position."""
        keeper = _placing(site).on(layers=None if layers is None else list(layers))
        with still(self.model), attach(self.model, as_stack(under) | keeper) as run:
            run(**inputs)
        return Fitted({str(layer): stat.value[0] for layer, stat in run[keeper].items()})

    def first_order(self, values: Fitted, positions: tuple[int, ...] | None) -> Callable[[Head], float]:
        """Each head's effect, were the metric linear in what heads hand over."""
        keeper, change = keeping(Site.HEAD_OUTPUT), _Change(values, positions)
        with (
            still(self.model),
            attach(self.model, self.under | keeper | change, roles=self.roles) as run,
            following(self.model),
        ):
            self.metric(run(**self.corrupt).logits).double().mean().backward()
        effects = {}
        for layer, stat in run[keeper].items():
            (heads,) = stat.value
            (moved,) = run[change][layer].value
            effects[layer] = (moved * heads.grad).sum((0, 2, 3)) / (self.high - self.low)
        return lambda head: float(effects[head[0]][head[1]])

    def each(self, effect: Callable[[Head], float]) -> HeadEffects:
        share = torch.full((len(self.sizes), max(size.heads for size in self.sizes)), float("nan"))
        for size in self.sizes:
            for head in range(size.heads if size.number in self.requested else 0):
                share[size.number, head] = effect((size.number, head))
        return HeadEffects(share, self.high, self.low)


def _as_pairs(heads_of: Mapping[int, list[int]]) -> list[Head]:
    return [(layer, head) for layer, heads in heads_of.items() for head in heads]


def _require_groups(sizes: Sequence[Layer], heads_of: Mapping[int, list[int]], side: str) -> None:
    """Refuse receivers that share a key head with heads that are none: what is put there would reach those too."""
    for layer in (size for size in sizes if size.number in heads_of):
        count = layer.heads // layer.kv_heads
        groups = {head // count for head in heads_of[layer.number]}
        whole = [(layer.number, count * group + i) for group in sorted(groups) for i in range(count)]
        if len(whole) != len(heads_of[layer.number]):
            rule = (
                f"must be whole groups with side={side!r}: {count} heads each share a key head in layer {layer.number}"
            )
            raise FieldError("path_patching()", "receivers", _as_pairs(heads_of), rule, whole)


def _require_texts_apart(inputs: Mapping[str, Tensor]) -> None:
    """Refuse texts that share a row: heads are put by text position, which each of them would have once."""
    places, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if places is None or places.ndim != 2:
        return
    anew = places.diff(dim=-1) < 0
    if mask is not None and mask.ndim == 2:  # padding may have any place
        anew = anew & mask[:, :-1].bool() & mask[:, 1:].bool()
    if bool(anew.any()):
        rule = "begin anew inside a row, where several texts are packed; give each text a row of its own, padded"
        raise FieldError("patching()", "position_ids", places, rule, None)


def _whole(model: nn.Module, field: str, given: Inputs, tokenizer: Any) -> dict[str, Any]:
    """All that the model is called with."""
    if isinstance(given, Tensor | Mapping):
        return {"input_ids": given} if isinstance(given, Tensor) else dict(given)
    found = fed_each("patching()", model, given, tokenizer, field)
    mask = found.get("attention_mask")
    if mask is not None and not mask.all():
        counts = ", ".join(map(str, mask.sum(-1).tolist()))
        rule = "must be of equally many tokens, or a metric would look at padding; else give what the tokenizer makes"
        raise FieldError("patching()", field, f"texts of {counts} tokens", rule, ["Anna told Bob", "Carl told Dora"])
    return found


class _Change(Method):
    """Reads how far what heads hand over lies from another run's, where that would be put."""

    paper = Patch.paper
    values: Fitted
    positions: tuple[int, ...] | None = None

    @reads(Site.HEAD_OUTPUT)
    def change(self, heads: Tensor, call: Call) -> Cat:
        own = heads.detach()
        return Cat.of("all", patched(own, call.q_pos, self.values, self.positions, call) - own)


@cache
def _placing(site: Site) -> Method:
    """A reader that keeps `[b h n d]` of a site as `patched` looks for it: by text position, without padding."""

    def keep(self: Method, x: Tensor, call: Call) -> Cat:
        require_once("patching()", call)
        place, is_text = call.q_pos[..., None], call.is_text[..., None]
        index = place.clamp(0, x.shape[2] - 1).expand_as(x)
        return Cat.of("all", torch.zeros_like(x).scatter_add(2, index, x.where(is_text, 0.0)))

    body = {"keep": reads(site)(keep), "paper": Patch.paper, "__module__": __name__}
    return type(f"_Place{site.name.title()}", (Method,), body)()


@cache
def _putting(site: Site) -> Any:
    """`Patch` for queries, keys or values."""

    def put(self: Any, x: Tensor, call: Call) -> Tensor:
        place = call.q_pos if site is Site.QUERY else call.k_pos
        return patched(x, place, self.values, None, call)

    body = {"put": at(site)(put), "paper": Patch.paper, "__module__": __name__}
    body |= {"values": None, "__annotations__": {"values": "Fitted | None"}}
    return type(f"_Put{site.name.title()}", (Method,), body)
