"""Laws that a method must keep inside a model, tried on tiny random ones."""

from __future__ import annotations

import hashlib
import inspect
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.cache_name import CACHE, cache_of
from heedful.api import attach
from heedful.conformance.bare import ROLES, Bare
from heedful.conformance.place import reseeded
from heedful.conformance.subjects import (
    LENGTH,
    TEXT,
    Subject,
    in_training,
    once,
    subjects_of,
    text,
    tiny_model,
)
from heedful.conformance.tolerances import close_model, error
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.call import Call
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import ClashError, HeedfulError
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.core.values import replace


@torch.no_grad()
def logits(model: nn.Module, what: Any = None, backend: str = "auto", **inputs: Any) -> Tensor:
    """What a model of text answers, as it is or under a stack."""
    return replace(TEXT, inputs=lambda: inputs).logits(model, what, backend)


def for_text(method: Method) -> None:
    """Pass over methods that are not for text."""
    if "text" not in method.subjects:
        raise DoesNotApply(f"is for {', '.join(method.subjects)}, not for text")


def tried_on(method: Method, first: bool = False) -> Iterator[tuple[Subject, str, nn.Module]]:
    """The subjects that a method is for, with their models; `first`: one model of each."""
    made = in_training if in_training_alone(method) else tiny_model
    for subject in subjects_of(method):
        for kind in subject.kinds[: 1 if first else None]:
            yield subject, kind, made(kind)


def in_training_alone(method: Method) -> bool:
    """Whether a method is idle where nothing is trained; models that decode are at rest, and it is so there."""
    calls = [Bare(rules=rules).call for rules in (None, ())]  # some rest under a mask too
    return not all(map(method.idle, calls)) and all(method.idle(replace(call, training=False)) for call in calls)


def _edits(method: Method) -> bool:
    return any(not e.reads for e in method.edits)


@law("neutral settings, and readers always, leave every logit as it was, bit for bit")
def neutral_is_native(method: Method) -> None:
    quiet = method if not _edits(method) else type(method).neutral()
    if quiet is None:
        raise DoesNotApply("has no neutral settings")
    for subject, kind, model in tried_on(method):
        native, found = once(model, subject.logits), subject.logits(model, quiet, "reference")
        if not torch.equal(found, native):
            raise Broken(f"{kind}: {quiet!r} moves logits by {error(found, native):.2g}")
        if _edits(method) and type(quiet).idle is not Method.idle:
            with torch.no_grad(), subject.attach(model, quiet) as run:
                run(**subject.inputs())
            if not run.state.idled:
                raise Broken(f"{kind}: {quiet!r} has nothing to do and does not say so: it is never idle")


@law("example settings change the output, and every layer is entered")
def example_acts(method: Method) -> None:
    for subject, kind, model in tried_on(method):
        steps = subject is TEXT and _edits(method)
        with torch.set_grad_enabled(not _edits(method)), subject.attach(model, method) as run:
            found = _two_steps(run) if steps else run(**subject.inputs()).logits
            seen, learns = run.activity(), bool(run.parameters())
            if found.requires_grad:  # some readings are of gradients
                found.sum().backward()
                model.zero_grad()
        if len(seen.entered) < seen.layers:
            raise Broken(f"{kind}: {len(seen.entered)} of {seen.layers} layers were entered")
        if not _edits(method):
            if not run.answers() and not any(e.loss for e in method.edits):
                raise Broken(f"{kind}: {method!r} reads nothing")
            continue
        native = once(model, _two_steps if steps else subject.logits)
        if close_model(found, native):
            if _acts_after_a_gradient(method, subject, model):
                continue
            hint = "; let `example` begin with parameters that act" if learns else ""
            raise Broken(f"{kind}: {method!r} changes nothing beyond rounding{hint}")
        if seen.inactive:
            raise Broken(f"{kind}: {'; '.join(seen.inactive)} changed nothing (what only looks is marked @reads)")


def _acts_after_a_gradient(method: Method, subject: Subject, model: nn.Module) -> bool:
    """Whether a forward is changed once one before it in the same run went back: some act in training by gradients."""
    if not in_training_alone(method):
        return False
    with subject.attach(model, method) as run:
        run(**subject.inputs()).logits.square().sum().backward()
        model.zero_grad()
        with torch.no_grad():
            found = run(**subject.inputs()).logits
    return not close_model(found, once(model, subject.logits))


def _two_steps(model: Any) -> Tensor:
    """The logits of a text and of two tokens after it."""
    ids = text()
    out = model(input_ids=ids[:, :-2], use_cache=True)
    logits = [out.logits]
    for i in (-2, -1):
        out = model(input_ids=ids[:, i : LENGTH + i + 1], use_cache=True, **{CACHE: cache_of(out)})
        logits.append(out.logits)
    return torch.cat(logits, 1)


SPY_PAPER = Paper("none", "A spy of the laws", "heedful", 2026)
BEFORE_MAP = (Site.HIDDEN, Site.QUERY, Site.KEY, Site.VALUE)


@cache
def _spy(site: Site) -> Method:
    """A method that keeps what it sees at one site."""

    def keep(self: Method, x: Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.layer}.{call.forward}", x)

    body = {"keep": reads(site)(keep), "paper": SPY_PAPER, "__module__": __name__}
    spy: type[Method] = type(f"Spy{site.name.title()}", (Method,), body)
    return spy()


@dataclass(frozen=True)
class _Seen:
    """What a spy sees first of a model, alone or behind others."""

    site: Site
    others: tuple[Method, ...] = ()

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        spy = _spy(self.site)
        reseeded()
        with attach(model, Stack((*self.others, spy)), roles=ROLES) as run:
            run(input_ids=text())
        return run[spy][0].pieces["0.0"]


@law("what comes before the first declared site, in the first layer, is untouched")
def declared_sites_only(method: Method) -> None:
    for_text(method)
    first = min(e.site.order for e in method.edits)
    whole = any(e.site is Site.BLOCK for e in method.edits)  # then nothing happens inside the block
    upstream = [site for site in BEFORE_MAP if site.order < first and not (whole and site.inside)]
    if any(e.before_rotary for e in method.edits):  # which declares that nothing is rotated
        upstream = [site for site in upstream if site not in (Site.QUERY, Site.KEY)]
    if not upstream:
        raise DoesNotApply(f"acts at {method.edits[0].site.name} already")
    model = tiny_model("llama")
    for site in upstream:
        if not torch.equal(once(model, _Seen(site)), _Seen(site, (method,))(model)):
            raise Broken(f"{site.name} changed, which the method does not declare")


def fingerprint(model: nn.Module) -> str:
    """A digest of everything a run might leave behind in a model."""
    digest = hashlib.sha256()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}{tuple(x.shape)}{x.dtype}{x.requires_grad}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
        digest.update(f"{name}{type(module).__qualname__}{module.training}{hooks}{sorted(vars(module))}".encode())
        config = getattr(module, "config", None)
        digest.update(
            f"{getattr(config, '_attn_implementation', None)}{getattr(config, 'to_json_string', str)()}".encode()
        )
    return digest.hexdigest()


class _Stop(HeedfulError):
    pass


@law("the model is as it was after a run, also after an exception inside it")
def leaves_no_trace(method: Method) -> None:
    for subject, kind, model in tried_on(method, first=True):
        try:
            _leaves_no_trace(method, subject, model)
        except Broken as how:
            raise Broken(f"{kind}: {how}") from how


def _leaves_no_trace(method: Method, subject: Subject, model: nn.Module) -> None:
    before, native = fingerprint(model), once(model, subject.logits)
    subject.logits(model, method)
    if fingerprint(model) != before:
        raise Broken("something stays in the model after a run")

    def stop(*_: Any) -> None:
        raise _Stop("a fault in the middle of the model")

    second = [m for name, m in model.named_modules() if name.endswith(".1")][-1]
    handle = second.register_forward_pre_hook(stop)
    try:
        subject.logits(model, method)
    except _Stop:
        pass
    finally:
        handle.remove()
    if fingerprint(model) != before:
        raise Broken("something stays in the model after an exception inside it")
    if not torch.equal(subject.logits(model), native):
        raise Broken("the model answers differently after a run")


@law("padding on the left and the order of a batch change nothing for the text")
def padding(method: Method) -> None:
    for_text(method)
    model, ids = tiny_model("llama"), text()
    plain = logits(model, method, input_ids=ids)
    swapped = logits(model, method, input_ids=ids.flip(0)).flip(0)
    if not close_model(swapped, plain):
        raise Broken(f"the order of a batch moves logits by {error(swapped, plain):.2g}")
    short = logits(model, method, input_ids=ids[:1, :-5])
    padded = torch.cat([ids.new_zeros(1, 5), ids[:1, :-5]], 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    both = logits(
        model,
        method,
        input_ids=torch.cat([padded, ids[1:]]),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # as `generate` gives them
    )
    if not close_model(both[:1, 5:], short):
        raise Broken(f"left padding moves logits by {error(both[:1, 5:], short):.2g}")
    if not close_model(both[1:], plain[1:]):
        raise Broken(f"another text's padding moves logits by {error(both[1:], plain[1:]):.2g}")


def meeting(method: Method) -> frozenset[tuple[int, bool, bool, bool]]:
    """What of a method another one meets: the sites by their order, and how it acts there."""
    return frozenset((e.site.order, e.reads, bool(e.sums), e.reweights) for e in method.edits)


def partners(method: Method, every: bool = False) -> list[Method]:
    """Methods of the catalogue to try beside this one: of each way to act at a site one, drawn by this one's name."""
    from heedful.catalogue import entries

    kinds = (kind.example() for kind in entries().values() if issubclass(kind, Method))
    others = [other for other in kinds if method.subjects[0] in other.subjects]
    if every:
        return others
    start, ways = zlib.crc32(type(method).__name__.encode()), Counter(way for other in others for way in meeting(other))
    chosen: list[Method] = []
    for way in sorted(ways, key=lambda way: (ways[way], way)):  # what acts in a rare way stands for common ones as well
        if not any(way in meeting(other) for other in chosen):
            alike = [other for other in others if way in meeting(other)]
            chosen.append(alike[start % len(alike)])
    return chosen


@law("with methods that act at any other site, or at the same, it works, or the clash is declared")
def composes(method: Method, every: bool = False) -> None:
    subject, _, model = next(iter(tried_on(method, first=True)))
    mine = {e.site for e in method.edits}
    for other in partners(method, every):
        shared = bool(mine & {e.site for e in other.edits})
        for a, b in ((method, other), (other, method))[: 2 if shared else 1]:
            try:
                stack = a | b
            except ClashError:
                continue
            try:
                found = subject.logits(model, stack)
            except HeedfulError as problem:
                raise Broken(f"{stack!r} fails and declares no clash: {problem}") from problem
            if not bool(found.isfinite().all()):
                raise Broken(f"{stack!r} gives numbers that are not finite")


@law("numbers that a method declares come true")
def declared_numbers(method: Method) -> None:
    for_text(method)
    declared = method.declares(LENGTH)
    if not declared:
        raise DoesNotApply("declares none")
    model = tiny_model("llama")
    with attach(model, method, roles=ROLES) as run, torch.no_grad():
        run(input_ids=text(), use_cache=True)
    seen = run.activity()
    rows = len(text())
    measured = {"density": [*seen.density.values()]}
    measured["kept"] = [kept / (rows * 2) for kept, _ in seen.kept.values()]  # 2 key heads
    for name, value in declared.items():
        found = measured.get(name)
        if not found:
            raise Broken(f"declares {name}, which nothing measures; known are {', '.join(measured)}")
        if any(abs(x - value) > 1e-9 * max(1.0, abs(value)) for x in found):
            raise Broken(f"declares {name} = {value:g} for {LENGTH} tokens, measured {found[0]:g}")


LEDGER = Path(__file__).parents[3] / "claims"
EVERY = ("method", "tokens", "decode", "surgery", "weights", "conversion")


@law("it has a paper, a demo and a claim", EVERY)
def is_documented(entry: CatalogueEntry) -> None:
    kind = type(entry)
    if not all(paper.title and paper.authors and (paper.link or paper.venue) for paper in kind.paper.every):
        raise Broken("its paper lacks title, authors or a way to find it")
    if not (kind.__doc__ or "").strip() or (kind.__doc__ or "").startswith(f"{kind.__name__}("):
        raise Broken("the class has no docstring")
    if not kind.__module__.startswith("heedful.methods."):
        return
    file = Path(inspect.getfile(kind))
    if '__name__ == "__main__"' not in file.read_text():
        raise Broken("its file has no demo under __main__")
    name = kind.paper.claim
    if not LEDGER.is_dir():
        return
    if not (LEDGER / f"{name}.py").exists():
        raise Broken(f"claims/{name}.py is missing")
    if not (LEDGER / "results" / f"{kind.paper.key}.json").exists():
        raise Broken(f"claims/results/{kind.paper.key}.json is missing; python -m claims.{name} writes it")
