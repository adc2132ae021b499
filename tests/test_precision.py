"""Mixed precision: under autocast a run computes in at least float32 what it is handed, and answers in its type."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful.authoring import Call, Method, Site
from heedful.conformance.tolerances import close, close_on_average
from heedful.explaining.aim import following
from heedful.explaining.site_values import keeping
from heedful.methods import (
    GEM,
    IFAM,
    AdaptiveSparseViT,
    AffineScaledAttention,
    BiLevelRoutingAttention,
    DualAttention,
    GatedHeads,
    HistoGraph,
    HyLRA,
    LLNAttention,
    MassiveQK,
    MaxActivations,
    ParallelToFirst,
    RoutingTransformer,
    SecondarySinks,
    SnapKV,
    SparkAttention,
    TaskKV,
    TokenPooling,
)
from tests.torch_models import Plain, tokens

pytestmark = pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")  # most edits here only look
HALF = torch.bfloat16
IDS = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))


def kept(site: Site, into: dict[Site, Tensor]) -> Any:
    """An edit that changes nothing and keeps what it saw last."""

    def keep(x: Tensor, call: Call) -> Tensor:
        into[site] = x.detach().clone()
        return x

    return heedful.edit(site, keep)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_products_are_not_rounded(backend: str) -> None:
    model, seen = heedful.models.tiny(), {}
    stack = kept(Site.QUERY, seen) | kept(Site.KEY, seen) | kept(Site.PATTERN, seen) | kept(Site.HEAD_OUTPUT, seen)
    stack |= kept(Site.VALUE, seen)
    with torch.autocast("cpu", HALF), heedful.attach(model, stack, backend=backend), torch.no_grad():
        model(IDS)
    q, k, v = (seen[site] for site in (Site.QUERY, Site.KEY, Site.VALUE))
    scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert {x.dtype for x in seen.values()} == {torch.float32}
    assert close(seen[Site.PATTERN], weights)
    assert close(seen[Site.HEAD_OUTPUT], weights @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("site", [Site.EMBEDDING, Site.HIDDEN, Site.HEAD_OUTPUT, Site.OUTPUT, Site.RESIDUAL])
def test_an_edit_works_as_it_is_written(site: Site) -> None:
    """Its products too, and the model goes on in the type that it had there."""
    model, found, types = heedful.models.tiny(), [], []

    def product(x: Tensor, call: Call) -> Tensor:
        square = x.mT @ x
        found.append((x, square))
        return x

    def types_of(_: Any, args: Any, output: Any) -> None:
        types.extend(t.dtype for t in (*args, output) if isinstance(t, Tensor))

    layer = model.model.layers[0]
    hooks = [m.register_forward_hook(types_of) for m in (layer, layer.self_attn.q_proj, layer.self_attn.o_proj)]
    with torch.autocast("cpu", HALF), torch.no_grad():
        model(IDS)
        before, types = types, []
        with heedful.attach(model, heedful.edit(site, product)):
            model(IDS)
    for hook in hooks:
        hook.remove()
    assert found
    assert all(x.dtype == torch.float32 and close(square, x.mT @ x) for x, square in found)
    assert types == before


@pytest.mark.parametrize(
    "method",
    [SnapKV(6, window=2), TaskKV.example(), HyLRA.example(), SparkAttention(), LLNAttention(), DualAttention.example()],
    ids=repr,
)
def test_methods_generate(method: Method) -> None:
    model = heedful.models.tiny()
    with torch.autocast("cpu", HALF), heedful.attach(model, method):
        out = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 27)


def test_an_image_is_routed() -> None:
    model = heedful.models.tiny("vit", image_size=16)
    inputs = heedful.models.tiny_inputs(model)
    with torch.autocast("cpu", HALF), heedful.attach(model, BiLevelRoutingAttention.example()) as run:
        assert run(**inputs).logits.isfinite().all()


def test_what_is_learned_meets_what_is_narrow() -> None:
    """Parameters are as wide as the model's weights, and heads are narrow."""
    model = heedful.models.tiny()
    with torch.autocast("cpu", HALF), heedful.attach(model, GatedHeads() | LLNAttention()) as run:
        model(IDS, labels=IDS).loss.backward()
        found = [p.grad for p in run.parameters()]
    assert found
    assert all(x is not None and x.dtype == torch.float32 and bool(x.isfinite().all()) for x in found)


def test_a_model_is_diagnosed_under_autocast() -> None:
    model = heedful.models.tiny()
    with torch.autocast("cpu", HALF):
        found = heedful.diagnose(model, IDS)
    assert found.view is not None
    assert str(found).startswith("LlamaForCausalLM: 2 layers of 4 heads, 2 texts of 48 tokens")
    reads = heedful.models.tiny("vit", image_size=16)
    with torch.autocast("cpu", HALF):
        found = heedful.diagnose(reads, heedful.models.tiny_inputs(reads)["pixel_values"])
    assert found.view is not None


def test_tokens_are_pooled_in_double_precision() -> None:
    model = heedful.models.tiny("vit", image_size=16, dtype=torch.float64)
    with heedful.attach(model, TokenPooling.example()) as run:
        assert run(**heedful.models.tiny_inputs(model)).logits.dtype == torch.float64


def test_a_bias_is_widened_too() -> None:
    found: list[torch.dtype] = []

    def told(scores: Tensor, call: Call) -> Tensor:
        assert call.bias is not None
        found.append(call.bias.dtype)
        return scores + call.bias.mean()

    model, x = Plain(attn_mask=torch.randn(10, 10).to(HALF)), tokens()
    with torch.autocast("cpu", HALF), torch.no_grad(), heedful.attach(model, heedful.edit(Site.SCORES, told)):
        model(x)
    assert found == [torch.float32] * 2


def narrow_and_whole(dtype: torch.dtype) -> tuple[Any, Any]:
    """A model in half precision whose stream is large, as streams of trained models are, and one of its weights."""
    narrow: Any = heedful.models.tiny("llama", dtype=dtype)
    with torch.no_grad():
        narrow.model.embed_tokens.weight *= 3000 / narrow.model.embed_tokens.weight.abs().max()
    return narrow, copy.deepcopy(narrow).float()


@pytest.mark.parametrize("dtype", [torch.float16, HALF], ids=str)
@pytest.mark.parametrize(
    "measure", [MaxActivations(), MassiveQK(), SecondarySinks(near=0.3, primary=0.5), ParallelToFirst()], ids=repr
)
@torch.no_grad()
def test_a_model_in_half_precision_is_read_as_one_of_its_weights_in_whole(measure: Method, dtype: torch.dtype) -> None:
    found = []
    for model in narrow_and_whole(dtype):
        kept = heedful.diagnose(model, IDS, measures=[measure]).statistics
        found.append(torch.cat([x.double().flatten() for key in sorted(kept) for x in kept[key].tensors().values()]))
    assert bool(found[1].any())
    off = (found[0] - found[1]).abs() / found[1].abs().clamp(min=1)
    assert bool(found[0].isfinite().all())
    assert float(off.mean()) < 0.02  # a place or a count on its threshold may fall to either side


@pytest.mark.parametrize("site", [Site.EMBEDDING, Site.HIDDEN, Site.KEY, Site.HEAD_OUTPUT, Site.OUTPUT, Site.RESIDUAL])
def test_readers_see_single_precision_and_change_nothing(site: Site) -> None:
    model, ids = heedful.models.tiny("llama", dtype=torch.float16), IDS[:1]
    reader, seen = keeping(site), {}
    plain = model(ids).logits
    with heedful.attach(model, reader) as run, following(model):
        logits = run(ids).logits
        seen = {layer: stat.value[0] for layer, stat in run[reader].items()}
        logits.float().logsumexp(-1).sum().backward()
    assert torch.equal(logits, plain)
    assert {x.dtype for x in seen.values()} == {torch.float32}
    assert all(x.grad is not None and bool(x.grad.any()) for x in seen.values())


@pytest.mark.parametrize(
    "method", [GEM(last=1, seed=0), HistoGraph(), AdaptiveSparseViT(layers=(1,)), IFAM(stage=1)], ids=repr
)
@torch.no_grad()
def test_what_was_read_meets_what_is_narrow(method: Method) -> None:
    model = heedful.models.tiny("vit", image_size=16).half()
    with heedful.attach(model, method) as run:
        out = run(pixel_values=heedful.models.tiny_inputs(model)["pixel_values"].half())
    assert out[0].dtype is torch.float16
    assert bool(out[0].isfinite().all())


def test_what_is_read_is_alike_on_average_and_strange_in_the_same_places() -> None:
    inf, x = float("inf"), torch.tensor([1.0, 2.0, float("inf")])
    assert close_on_average(torch.tensor([1.1, 2.0, inf]), x)
    for y in ([1.2, 2.0, inf], [1.0, 2.0, 3.0], [inf, 2.0, inf], [1.0, 2.0]):
        assert not close_on_average(torch.tensor(y), x)


@pytest.mark.parametrize("method", [RoutingTransformer(3, 0.99999), AffineScaledAttention(0.999)], ids=repr)
def test_what_no_gradient_moves_is_kept_in_single_precision_and_loaded_so(method: Method, tmp_path: Path) -> None:
    model = heedful.models.tiny("llama", dtype=HALF).train()
    with heedful.attach(model, method | GatedHeads()) as run:
        moving = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        assert {p.dtype for p in moving.values()} == {torch.float32}
        assert {p.dtype for name, p in model.named_parameters() if name not in moving} == {HALF}
        before = {name: p.clone() for name, p in moving.items()}
        run(IDS, labels=IDS).loss.backward()
        assert all((p != before[name]).any() for name, p in moving.items()), "a step that half precision would lose"
        model.save_pretrained(tmp_path)
    with heedful.load(tmp_path) as again:
        loaded = {name: p for name, p in again.model.named_parameters() if not p.requires_grad}
        assert again.model.dtype is HALF
        assert set(loaded) == set(moving)
        assert all(torch.equal(p, moving[name]) and p.dtype == torch.float32 for name, p in loaded.items())
