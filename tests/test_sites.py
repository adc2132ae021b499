"""What an edit may do beyond one site: many sites, steps that fields switch on, neighbours, penalties, whole blocks."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from heedful import attach, edit, explain, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import CachedKV, Call, Kept
from heedful.core.errors import ClashError, DefinitionError, FieldError, RefusedModel, SiteError, StatisticError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, penalises, reads
from heedful.core.stats import Sum
from heedful.methods.intervene.language.temp_scale import TempScale
from tests.samples import Sharpness

PAPER = Paper("none", "A test", "heedful", 2026)
IDS = torch.randint(3, 100, (2, 23), generator=torch.Generator().manual_seed(0))


class Many(Method):
    """Three edits and a reader; one edit is there only where `bias` is not zero."""

    paper = PAPER
    bias: float = 0.0

    @at(Site.QUERY)
    def double(self, q: Tensor, call: Call) -> Tensor:
        return q * 2

    @at(Site.KEY)
    def halve(self, k: Tensor, call: Call) -> Tensor:
        return k / 2

    @at(Site.SCORES, when="bias")
    def tilt(self, scores: Tensor, call: Call) -> Tensor:
        return scores + self.bias * call.distance

    @at(Site.HEAD_OUTPUT)
    def flip(self, heads: Tensor, call: Call) -> Tensor:
        return -heads

    @reads(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> Sum:
        return Sum.of(heads.sum())


def test_a_field_switches_a_step_on() -> None:
    assert [e.name for e in Many.edits] == ["double", "halve", "tilt", "flip", "look"]
    assert [e.name for e in Many().edits] == ["double", "halve", "flip", "look"]
    chosen = {
        name: next(c for c in explain(Many(bias)).choices if c.chosen).backend
        for name, bias in (("off", 0.0), ("on", 0.1))
    }
    assert chosen == {"off": "sdpa", "on": "tiled"}


def test_several_sites_act_in_one_method() -> None:
    model = models.tiny("llama").eval()
    with attach(model, Many()) as run, torch.no_grad():
        found = run(input_ids=IDS).logits
    (values,) = {tuple(s.value.shape) for s in run[Many()].values()}
    assert values == ()
    with torch.no_grad():
        assert not close_model(found, model(input_ids=IDS).logits)


def test_penalties_add_up_and_join_the_models_loss() -> None:
    model = models.tiny("llama").eval()
    with torch.no_grad():
        plain = model(input_ids=IDS, labels=IDS).loss
    with attach(model, Sharpness(0.5) | Sharpness(0.25)) as run:
        with pytest.raises(StatisticError, match="penalised nothing yet"):
            run.loss()
        out = run(input_ids=IDS, labels=IDS)
        assert close_model(out.loss.detach(), (plain + run.loss()).detach())
        as_tuple = run(input_ids=IDS, labels=IDS, return_dict=False)[0]
        assert torch.equal(as_tuple, out.loss)
        by_place = inspect.signature(model.forward).bind(input_ids=IDS, labels=IDS)
        by_place.apply_defaults()
        upto = list(by_place.arguments).index("labels") + 1
        assert torch.equal(run(*list(by_place.arguments.values())[:upto]).loss, out.loss), "labels without their name"
        loss = run.loss()
        loss.backward()
        assert bool(loss > 0)
        run(input_ids=IDS[:, :5])
        assert bool(run.loss() < loss / 2), "each forward has its own"
    grads = [p.grad for n, p in model.named_parameters() if "q_proj" in n]
    assert all(g is not None and bool(g.any()) for g in grads)
    with attach(model, TempScale(0.5)) as run, pytest.raises(FieldError, match="penalises nothing"):
        run.loss()


class Ones(Method):
    paper = PAPER

    @reads(Site.HEAD_OUTPUT)
    def count(self, heads: Tensor, call: Call) -> Sum:
        return Sum.of(torch.ones(()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_counts_once(reentrant: bool) -> None:
    def checkpointed() -> torch.nn.Module:
        model = models.tiny("llama").train()
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                    f, *a, use_reentrant=reentrant
                )
        model.enable_input_require_grads()
        return model

    with attach(checkpointed(), Ones()) as run:
        run(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert [float(s.value) for s in run[Ones()].values()] == [1.0, 1.0]
    if reentrant:
        with pytest.raises(SiteError, match="use_reentrant=False"), attach(checkpointed(), Sharpness()) as run:
            run(input_ids=IDS, labels=IDS, use_cache=False)
        return
    with attach(checkpointed(), Sharpness()) as run:
        loss = run(input_ids=IDS, labels=IDS, use_cache=False).loss
        before = run.loss().item()
        loss.backward()
        assert run.loss().item() == before


def test_a_model_that_gives_no_loss_is_left_as_it_is() -> None:
    model = models.tiny("llama").eval().model
    with attach(model, Sharpness()) as run, torch.no_grad():
        plain = run(input_ids=IDS)[0]
        for as_dict in (True, False):
            assert torch.equal(run(input_ids=IDS, labels=IDS, return_dict=as_dict)[0], plain)


def test_a_penalty_is_one_number() -> None:
    class Wrong(Method):
        paper = PAPER

        @penalises(Site.HEAD_OUTPUT)
        def all_of_it(self, heads: Tensor, call: Call) -> Tensor:
            return heads

    with pytest.raises(DefinitionError, match="without axes"), attach(models.tiny("llama"), Wrong()) as run:
        run(input_ids=IDS)


class Latent(Method):
    """Adds a learned vector to what enters the first layer."""

    paper = PAPER

    def parameters(self, layer) -> dict[str, Tensor]:
        return {"shift": torch.zeros(layer.width)} if layer.number == 0 else {}

    @at(Site.EMBEDDING)
    def add(self, x: Tensor, call: Call) -> Tensor:
        return x + call.params["shift"]


def test_a_latent_at_the_embedding_learns_from_a_penalty() -> None:
    model = models.tiny("llama").eval()
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    with attach(model, Latent() | Sharpness(0.01)) as run:
        assert close_model(run(input_ids=IDS).logits.detach(), plain), "a shift of nothing changes nothing"
        losses = []
        for _ in range(4):
            run(input_ids=IDS)
            losses.append(run.loss())
            (grad,) = torch.autograd.grad(losses[-1], run.parameters())
            with torch.no_grad():
                run.parameters()[0].sub_(0.02 * grad / grad.norm())
    assert bool((torch.stack(losses).diff() < 0).all())


class Constant(Method):
    """The block gives the mean of its inputs so far."""

    paper = PAPER

    @at(Site.BLOCK)
    def mean(self, x: Tensor, call: Call) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]


def test_a_block_replaces_everything_between_hidden_and_output() -> None:
    model = models.tiny("llama").eval()
    seen = []

    class Spy(Method):
        paper = PAPER

        @reads(Site.OUTPUT)
        def look(self, x: Tensor, call: Call) -> None:
            seen.append(x)

    with attach(model, Constant() | Spy()) as run, torch.no_grad():
        found = run(input_ids=IDS, output_hidden_states=True)
    first = model.model.layers[0]
    normed = first.input_layernorm(found.hidden_states[0])
    assert close(seen[0], normed.cumsum(1) / torch.arange(1, 24)[None, :, None])
    with attach(model, Constant().on(layers=0)) as run, torch.no_grad():
        out = run(input_ids=IDS, use_cache=True)
        assert run.active
        assert out[CACHE].get_seq_length() == 23
    with pytest.raises(ClashError, match="replaces the whole block, so there is no SCORES"):
        Constant() | TempScale(0.5)
    with pytest.raises(ClashError, match="both replace BLOCK"):
        Constant() | Constant()
    assert len(Constant().on(layers=0) | TempScale(0.5).on(layers=1)) == 2


def test_a_block_honours_causality_or_is_refused() -> None:
    model = models.tiny("mistral", sliding_window=4).eval()
    with pytest.raises(SiteError, match="narrower mask"), attach(model, Constant()) as run:
        run(input_ids=IDS)


class Blend(Method):
    """Drops the first entry of each head and puts the mean of both into the second."""

    paper = PAPER

    @at(Site.CACHE)
    def merge(self, entries: CachedKV, call: Call) -> Kept:
        keep = entries.is_filled.clone()
        keep[:, :, 0] = False
        key, value = entries.key.clone(), entries.value.clone()
        for x in (key, value):
            x[:, :, 1] = (x[:, :, 0] + x[:, :, 1]) / 2
        return Kept(keep, key, value)


class Halve(Method):
    """Halves every value, and keeps all."""

    paper = PAPER

    @at(Site.CACHE)
    def halve(self, entries: CachedKV, call: Call) -> Kept:
        return Kept(value=entries.value / 2)


@torch.no_grad()
def test_a_cache_edit_may_keep_all_without_a_word() -> None:
    model = models.tiny("llama").eval()
    plain = model(input_ids=IDS, use_cache=True)[CACHE].layers[0]
    with attach(model, Halve()) as run:
        held = run(input_ids=IDS, use_cache=True)[CACHE].layers[0]
    assert held.whole
    assert torch.equal(held.values, plain.values / 2)
    with attach(model, Halve().on(heads=(0, 1)) | Blend().on(layers=0, heads=(2, 3))) as run:
        held = run(input_ids=IDS, use_cache=True)[CACHE].layers[0]
    assert held.counts == [23, 22, 23, 22]
    assert torch.equal(held.values[:, 0], plain.values[:, 0] / 2)


def test_a_cache_edit_that_returns_nothing_is_refused() -> None:
    class Forgot(Method):
        paper = PAPER

        @at(Site.CACHE)
        def forget(self, entries: CachedKV, call: Call) -> None: ...

    with pytest.raises(SiteError, match=r"must return which entries stay.*got NoneType"):  # noqa: SIM117
        with attach(models.tiny("llama"), Forgot()) as run:
            run(input_ids=IDS, use_cache=True)


def test_a_cache_edit_may_merge_entries() -> None:
    model = models.tiny("llama").eval()
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=True)[CACHE].layers[0]
        with attach(model, Blend().on(layers=0)) as run:
            cache = run(input_ids=IDS, use_cache=True)[CACHE]
    for name in ("keys", "values"):
        want = getattr(plain, name)
        want = torch.cat([(want[:, :, :1] + want[:, :, 1:2]) / 2, want[:, :, 2:]], 2)
        assert close(getattr(cache.layers[0], name), want)
    with torch.no_grad(), attach(model, Blend().on(layers=0, heads=(0, 1))) as run:
        part = run(input_ids=IDS, use_cache=True)[CACHE].layers[0]
    assert part.counts == [22, 23, 22, 23]


def test_a_merge_keeps_the_shape() -> None:
    class Wrong(Method):
        paper = PAPER

        @at(Site.CACHE)
        def cut(self, entries: CachedKV, call: Call) -> Kept:
            return Kept(entries.is_filled, value=entries.value[..., :1])

    with pytest.raises(SiteError, match="a Kept's value has the shape"), attach(models.tiny("llama"), Wrong()) as run:
        run(input_ids=IDS, use_cache=True)


def test_the_embedding_enters_the_first_layer_alone() -> None:
    seen = []

    class Reweight(Method):
        paper = PAPER

        @at(Site.EMBEDDING)
        def shift(self, x: Tensor, call: Call) -> Tensor:
            seen.append(call.layer)
            return x + 1

    for kind in ("llama", "bert"):
        model = models.tiny(kind).eval()
        with attach(model, Reweight()) as run, torch.no_grad():
            first = run(input_ids=IDS, output_hidden_states=True).hidden_states
        plain = model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert not close(first[1], plain[1].detach())
    assert seen == [0, 0]
    with pytest.raises(RefusedModel, match="no first layer"):
        attach(models.tiny("llama"), Reweight(), only="model.layers.1")


def test_a_plain_function_is_an_edit() -> None:
    def mirror(weights: Tensor, call: Call) -> Tensor:
        return weights.flip(1)

    model = models.tiny("llama").eval()

    class Mirror(Method):
        paper = PAPER

        @at(Site.PATTERN)
        def act(self, weights: Tensor, call: Call) -> Tensor:
            return weights.flip(1)

    found = []
    for method in (edit(Site.PATTERN, mirror), Mirror()):
        with attach(model, method.on(layers=0) | TempScale(0.5)) as run, torch.no_grad():
            found.append(run(input_ids=IDS).logits)
    assert torch.equal(*found)
    assert edit(Site.PATTERN, mirror) == edit(Site.PATTERN, mirror)
    stack = edit(Site.PATTERN, mirror).on(layers=0) | TempScale(0.5)
    assert repr(stack) == "edit(Site.PATTERN, mirror).on(layers=[0]) | TempScale(tau=0.5)"
    assert stack.cite() == TempScale(0.5).paper.bibtex()
    with pytest.raises(FieldError, match="must be Site"):
        edit("pattern", mirror)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="must be Callable"):
        edit(Site.PATTERN, 3)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"edit\(\).function = .*TempScale.*: must be a function, and no class"):
        edit(Site.PATTERN, TempScale)
    with pytest.raises(FieldError, match="must take the site's value and the call"):
        edit(Site.PATTERN, lambda weights: weights)  # type: ignore[arg-type, misc]


def test_only_what_serves_another_method_needs_no_paper() -> None:
    class _Helper(Method):
        @at(Site.PATTERN)
        def act(self, weights: Tensor, call: Call) -> Tensor:
            return weights

    assert (_Helper() | TempScale(0.5)).cite() == TempScale(0.5).paper.bibtex()
    with pytest.raises(DefinitionError, match="Public has no paper"):
        type("Public", (_Helper,), {})


@pytest.mark.parametrize("rows", [None, 4])
def test_what_stands_behind_an_edit_of_the_pattern_sees_no_weight_on_masked_pairs(rows: int | None) -> None:
    hidden: list[bool] = []

    def more(weights: Tensor, call: Call) -> Tensor:
        assert call.keep is not None
        hidden.append(bool(weights.masked_fill(call.keep, 0.0).any()))
        return weights + 0.1

    with attach(models.tiny("llama"), edit(Site.PATTERN, more) | edit(Site.PATTERN, more), tile_rows=rows) as run:
        run(input_ids=IDS[:1, :12])
    assert len(hidden) >= 4
    assert not any(hidden)
