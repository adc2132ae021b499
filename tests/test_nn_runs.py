"""What `heedful.nn.Attention` is beside its answers: decoding, parameters, its run, copies, checkpoints, compilers."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

import heedful
from heedful import catalogue
from heedful.conformance.bare import ROLES
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, RefusedModel, SiteError
from heedful.core.method import Method
from heedful.core.regions import Region
from heedful.methods import (
    AffineScaledAttention,
    GatedHeads,
    MixtureOfHeads,
    SigmoidAttention,
    SinkRate,
    SinkWindow,
    TempScale,
)
from heedful.nn import Attention, convert
from tests.mechanisms import AFTER, BY_TOKENS, DRAWN, MECHANISMS, OUTSIDE, READ

E, H, B, N = 32, 4, 2, 21
LEFT = torch.arange(N)[None] < torch.tensor([[5], [0]])


def text(seed: int = 1) -> Tensor:
    return torch.randn(B, N, E, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 1) -> Tensor:
    """As many tokens as an image has in the laws: a class token and 4 x 4 patches."""
    return text(seed)[:, :17]


IMAGE = {**ROLES, "patches": Region(((1, 17),), (4, 4))}


def causal(method: Any = None, **how: Any) -> Attention:
    return Attention(E, H, method, causal=True, batch_first=True, **how)


@torch.no_grad()
def in_pieces(mine: Attention, x: Tensor, size: int, padding: Tensor | None = None, cache: Any = None) -> Tensor:
    """The output where the text comes a few tokens at a time."""
    cache, parts = DynamicCache() if cache is None else cache, []
    for start in range(0, x.shape[1], size):
        part, stop = x[:, start : start + size], start + size
        how = {} if padding is None else {"key_padding_mask": padding[:, :stop]}
        parts.append(mine(part, part, part, cache=cache, need_weights=False, **how)[0])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", READ)
def test_every_mechanism_for_text_acts_and_decodes_as_it_reads(name: str) -> None:
    method = MECHANISMS[name].example()
    mine, x = causal(method, kv_heads=2).eval(), text()  # at rest, as what decodes is
    sizes = (1, 5) if method.chunk_invariant else ()
    mine.run.roles = ROLES
    for padding in (None, LEFT):
        is_text = torch.ones(B, N, dtype=torch.bool) if padding is None else ~padding
        with torch.no_grad():
            whole = mine(x, x, x, key_padding_mask=padding)[0]
            with mine.run.paused():
                assert not close_model(whole, mine(x, x, x, key_padding_mask=padding)[0])
            first = x[:, :13]
            before = mine(first, first, first, key_padding_mask=None if padding is None else padding[:, :13])[0]
        assert bool(whole.isfinite().all())
        if method.causal:
            assert close_model(before[is_text[:, :13]], whole[:, :13][is_text[:, :13]])
        for size in sizes:
            assert close_model(in_pieces(mine, x, size, padding)[is_text], whole[is_text])


@pytest.mark.parametrize("name", DRAWN)
def test_what_acts_in_training_alone_rests_with_the_module(name: str) -> None:
    mine, x = causal(MECHANISMS[name].example()), text()
    for training in (True, False):
        mine.train(training)
        out = mine(x, x, x)[0]
        with mine.run.paused():
            assert close_model(mine(x, x, x)[0], out) is not training


@pytest.mark.parametrize("name", AFTER)
def test_what_waits_for_a_gradient_acts_behind_one(name: str) -> None:
    mine, x = causal(MECHANISMS[name].example()).train(), text()
    first = mine(x, x, x)[0]
    with mine.run.paused():
        assert close_model(mine(x, x, x)[0], first)
    first.square().sum().backward()
    assert not close_model(mine(x, x, x)[0], first)


@pytest.mark.parametrize("name", [name for name, kind in MECHANISMS.items() if "image" in kind.subjects])
def test_every_mechanism_for_images_acts(name: str) -> None:
    mine, x = Attention(E, H, MECHANISMS[name].example(), batch_first=True), image()
    mine.run.roles = IMAGE
    out = mine(x, x, x)[0]
    assert bool(out.isfinite().all())
    with mine.run.paused():
        assert not close_model(mine(x, x, x)[0], out)


@pytest.mark.parametrize("name", [name for name, kind in catalogue.entries().items() if issubclass(kind, Method)])
def test_every_other_method_runs_or_is_refused_with_the_reason(name: str) -> None:
    method = catalogue.entries()[name].example()
    sites = {edit.site for edit in method.edits}
    if sites & {heedful.Site.EMBEDDING, heedful.Site.RESIDUAL}:
        with pytest.raises(
            FieldError, match=r"acts in the stream around attention.*attach\(model, method\) acts there"
        ):
            causal(method, depth=3)  # examples name layers
        return
    reads = "text" in method.subjects
    mine, x = (causal(method), text()) if reads else (Attention(E, H, method, batch_first=True), image())
    mine.run.roles = ROLES if reads else IMAGE
    if name in BY_TOKENS:
        with pytest.raises(SiteError, match="was not given input_ids of this shape; hand it ids"):
            mine(x, x, x)
        return
    with torch.no_grad():
        assert bool(mine(x, x, x, need_weights=False)[0].isfinite().all())
    if reads and any(not edit.reads for edit in method.edits):
        assert bool(in_pieces(mine, x, 7).isfinite().all())


@pytest.mark.parametrize(
    "learns",
    [kind for name, kind in MECHANISMS.items() if kind.parameters is not Method.parameters and name not in OUTSIDE],
)
def test_what_mechanisms_learn_is_reached_by_gradients_or_moves_with_the_calls(learns: type[Method]) -> None:
    subject = learns.subjects[0]
    mine = Attention(E, H, learns.example(), causal=subject == "text", batch_first=True)
    x = image() if subject == "image" else text()
    other = text(2) if subject == "cross" else x
    mine.run.roles = IMAGE if subject == "image" else ROLES
    planted = {name: p for name, p in mine.named_parameters() if name.startswith("heedful_")}
    assert planted
    before = {name: p.detach().clone() for name, p in planted.items()}
    mine(x, other, other)[0].square().sum().backward()
    reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in planted.values()]
    assert any(reached) or any(not torch.equal(p, before[name]) for name, p in planted.items())


def test_modules_of_one_model_share_a_cache_and_beams_reorder_it() -> None:
    model = nn.ModuleList(
        causal(GatedHeads() | TempScale(0.5).on(layers=[1]), layer=i, depth=3, kv_heads=2) for i in range(3)
    )
    assert not torch.equal(model[0].heedful_GatedHeads_0_weight, model[1].heedful_GatedHeads_0_weight)

    def read(x: Tensor, cache: Any = None) -> Tensor:
        for layer in model:
            x = layer(x, x, x, cache=cache)[0]
        return x

    x, cache = text(), DynamicCache()
    wanted = read(x)
    assert close_model(torch.cat([read(part, cache) for part in x.split(4, 1)], 1), wanted)
    assert len(cache.layers) == 3
    with model[0].run.paused(), model[2].run.paused():
        assert not close_model(read(x), wanted)
    acting = [[str(step) for step in layer.run.stack.steps(layer.layer)] for layer in model]
    assert [steps != acting[0] for steps in acting] == [False, True, False]
    cache.crop(-5)
    assert close_model(read(x[:, -5:], cache), wanted[:, -5:])
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert close_model(read(x[[1, 1], -1:], cache), wanted[[1, 1], -1:])


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("method", [None, MECHANISMS["MALA"].example()])
def test_causality_told_by_masks_holds_with_a_cache_too(method: Any, size: int) -> None:
    mine, x = Attention(E, H, method, batch_first=True), text()
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    whole = mine(x, x, x, attn_mask=hidden)[0]
    for hint in (True, False):
        cache, start = DynamicCache(), 0
        for part in x.split(size, 1):
            stop = start + part.shape[1]
            found = mine(part, part, part, attn_mask=hidden[start:stop, :stop], is_causal=hint, cache=cache)[0]
            assert close_model(found, whole[:, start:stop])
            start = stop


@pytest.mark.parametrize("budget", [N, N - 2])  # room for the padding too, or heads of unlike numbers of entries
def test_what_is_kept_is_counted_of_texts(budget: int) -> None:
    padding = LEFT if budget == N else LEFT.flip(1)
    roomy, texts = causal(heedful.methods.KNorm(budget), kv_heads=2), (~padding).sum(1).tolist()
    in_pieces(roomy, text(), N, padding, DynamicCache())
    assert roomy.run.activity().kept[0] == (2 * sum(min(n, budget) for n in texts), 2 * sum(texts))


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    mine, x = Attention(E, H, bias=False, batch_first=True), text()
    padding = torch.stack([torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool)])
    out, weights = mine(x, x, x, key_padding_mask=padding)
    assert not out[0].any()
    assert not weights[0].any()
    assert close(out[1:], mine(x[1:], x[1:], x[1:])[0])


def test_a_cache_is_shortened_and_what_left_it_stays_away() -> None:
    keep = heedful.methods.KNorm(budget=6)
    mine, x, cache = causal(keep, kv_heads=2), text(), DynamicCache()
    out = in_pieces(mine, x, 7, LEFT, cache)
    assert cache.layers[0].counts == [6] * 4
    assert mine.run.activity().kept[0] == (24, 2 * int((~LEFT).sum()))  # padding is no entry of a text
    with torch.no_grad(), mine.run.paused():
        assert not close_model(out[0, -1], mine(x, x, x, key_padding_mask=LEFT)[0][0, -1])
    part = x[:, :1]
    with pytest.raises(SiteError, match="attn_mask cannot be laid over a cache with dropped entries"):
        mine(part, part, part, attn_mask=torch.randn(1, N + 1), cache=cache)


def test_a_cache_is_for_the_text_itself() -> None:
    mine, x = Attention(E, H, batch_first=True), text()
    with pytest.raises(FieldError, match="cache = 'DynamicCache': holds the keys of the text itself"):
        mine(x, x[:, :4], x[:, :4], cache=DynamicCache())


# what is learned


@torch.no_grad()
def test_parameters_are_saved_loaded_copied_and_swapped_by_torch() -> None:
    mine, x = causal(AffineScaledAttention() | GatedHeads()).eval(), text()
    for p in mine.parameters():
        p.normal_(0, 0.3)
    wanted = mine(x, x, x)[0]
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    other = causal(AffineScaledAttention() | GatedHeads()).eval()
    assert not close_model(other(x, x, x)[0], wanted)
    assert torch.equal(torch.func.functional_call(other, dict(mine.named_parameters()), (x, x, x))[0], wanted)
    other.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(other(x, x, x)[0], wanted)
    whole = io.BytesIO()
    torch.save(mine, whole)
    whole.seek(0)
    for like in (copy.deepcopy(mine), torch.load(whole, weights_only=False)):
        assert torch.equal(like(x, x, x)[0], wanted)
        assert like.run is not mine.run
        assert like.run.model is like
        like.heedful_GatedHeads_1_weight.zero_()
        assert not close_model(like(x, x, x)[0], wanted)
    assert torch.equal(mine(x, x, x)[0], wanted)
    assert close_model(mine.double()(x.double(), x.double(), x.double())[0].float(), wanted)


def test_a_model_of_them_learns() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    model = convert(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), SigmoidAttention() | GatedHeads())
    learner, x, wanted = torch.optim.AdamW(model.parameters(), 1e-2), text(), text(2)
    losses = []
    for _ in range(8):
        learner.zero_grad()
        losses.append((model(x) - wanted).square().mean())
        losses[-1].backward()
        learner.step()
    assert losses[-1].item() < 0.8 * losses[0].item()


def test_a_penalty_is_the_runs_loss() -> None:
    mine, x = causal(MixtureOfHeads()), text()
    mine(x, x, x)
    mine.run.loss().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for n, p in mine.named_parameters() if "heedful" in n)


# its run


def test_its_run_tells_pauses_and_closes() -> None:
    mine, x = causal(SinkRate() | SinkWindow(1, 4)), text()
    wanted = causal()
    wanted.load_state_dict(mine.state_dict())
    narrow = mine(x, x, x)[0]
    assert "first-token sink rate" in str(mine.run[SinkRate()])
    assert mine.run.active
    assert not close_model(wanted(x, x, x)[0], narrow)
    with mine.run.paused():
        assert torch.equal(mine(x, x, x)[0], wanted(x, x, x)[0])
    assert torch.equal(mine(x, x, x)[0], narrow)
    mine.run.close()
    assert torch.equal(mine(x, x, x)[0], wanted(x, x, x)[0])


def test_a_forward_that_fails_counts_for_nothing() -> None:
    def fail(x: Tensor, call: Any) -> Tensor:
        raise KeyError

    mine, x = causal(SinkRate() | heedful.edit(heedful.Site.OUTPUT, fail)), text()
    with pytest.raises(KeyError):
        mine(x, x, x)
    assert mine.run.state.statistics == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_the_same_again_and_counts_once(reentrant: bool) -> None:
    plain = causal(SinkRate() | GatedHeads())
    again = copy.deepcopy(plain)
    found = []
    for mine in (plain, again):
        x = text().requires_grad_()

        def once(y: Tensor, mine: Attention = mine) -> Tensor:
            return mine(y, y, y, need_weights=False)[0]

        out = once(x) if mine is plain else checkpoint(once, x, use_reentrant=reentrant)
        out.square().sum().backward()
        found.append((x.grad, torch.cat([p.grad.flatten() for p in mine.parameters()])))
    assert all(close(b, a) for a, b in zip(*found, strict=True))
    assert str(again.run[SinkRate()]) == str(plain.run[SinkRate()])


def test_attach_serves_a_model_of_them() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), text()
    with heedful.attach(model, SinkRate(), inputs=x) as run:
        run(x)
    wanted = str(run[SinkRate()])
    with heedful.attach(convert(model), SinkRate(), inputs=x) as run:
        run(x)
    assert run.layer_names == ("layers.0.self_attn", "layers.1.self_attn")
    assert str(run[SinkRate()]) == wanted


@pytest.fixture
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiled")
def test_the_compiler_goes_around_it() -> None:
    mine, x = causal(GatedHeads()), text()
    model = nn.Sequential(nn.Linear(E, E))
    model.attention = mine

    @torch.no_grad()
    def whole(x: Tensor) -> Tensor:
        y = model[0](x)
        return mine(y, y, y, need_weights=False)[0]

    assert close_model(torch.compile(whole, backend="eager")(x), whole(x))


def test_a_replica_is_refused() -> None:
    mine, x = causal(), text()
    with pytest.raises(RefusedModel, match="run in a replica, as DataParallel makes them"):
        mine._replicate_for_data_parallel()(x, x, x)


@torch.no_grad()
def test_threads_that_share_a_module_wait_for_one_another() -> None:
    """Tiles of a forward share memory, and what a run knows is of one forward."""
    mine = Attention(64, 4, SinkRate(), causal=True, batch_first=True).eval()
    mine.run.backend, rows = "tiled", torch.randn(24, 1, 200, 64)

    @torch.no_grad()
    def given(x: Tensor) -> Tensor:
        out: Tensor = mine(x, x, x, need_weights=False)[0]
        return out

    wanted = list(map(given, rows))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(given, rows))
    assert all(map(torch.equal, found, wanted))
    assert copy.deepcopy(mine)(rows[0], rows[0], rows[0])[0].shape == wanted[0].shape
