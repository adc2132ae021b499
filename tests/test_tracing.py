"""Patching place by place, against hooks on the model's own modules; and what a notebook shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models, patterns
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning, RefusedModel
from heedful.core.fitted import Fitted
from heedful.explaining import Trace, trace
from heedful.explaining.tracing import KINDS
from heedful.methods.explain.patch import Patch
from tests.samples import uneven

CLEAN, CORRUPT = [5, 17, 9, 88, 40, 23], [5, 17, 77, 88, 40, 23]
RIGHT, WRONG = 50, 60


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama")


def lead(model: Any, ids: list[int]) -> float:
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    return float(logits[RIGHT] - logits[WRONG])


@contextmanager
def hooked(module: Any, change: Callable[[Tensor], Tensor | None]) -> Any:
    def hook(_: Any, args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        new = change(first)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def seen(model: Any, module: Any, ids: list[int]) -> Tensor:
    found: list[Tensor] = []
    with hooked(module, lambda x: found.append(x.detach().clone())):
        lead(model, ids)
    return found[0]


@pytest.mark.parametrize(("what", "name"), [("residual", ""), ("attention", "self_attn"), ("mlp", "mlp")])
def test_each_layer_and_token_by_hooks(model: Any, what: Any, name: str) -> None:
    found = trace(model, CLEAN, CORRUPT, RIGHT, WRONG, what=what)
    with torch.no_grad():
        high, low = lead(model, CLEAN), lead(model, CORRUPT)
        wanted = torch.zeros(2, 6)
        for layer in range(2):
            module = model.model.layers[layer].get_submodule(name)
            good = seen(model, module, CLEAN)
            for place in range(6):

                def put(x: Tensor, good: Tensor = good, place: int = place) -> Tensor:
                    return torch.cat([x[:, :place], good[:, place : place + 1], x[:, place + 1 :]], 1)

                with hooked(module, put):
                    wanted[layer, place] = (lead(model, CORRUPT) - low) / (high - low)
    assert (found.clean, found.corrupt) == pytest.approx((high, low))
    assert close_model(found.share.float(), wanted)
    assert not found.share[:, :2].any()  # the texts begin alike
    assert found.share[0, 2] != 0
    if what == "residual":
        assert float(found.share[-1, -1]) == pytest.approx(1)


def test_heads_at_all_tokens_and_at_each(model: Any) -> None:
    whole = trace(model, CLEAN, CORRUPT, RIGHT, WRONG, what="heads")
    named = trace(model, CLEAN, CORRUPT, RIGHT, WRONG, what="heads", heads=[(1, 2), (0, 3)])
    assert named.heads == ((0, 3), (1, 2))
    handed: dict[str, Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, n=n: handed.update({str(n): args[0].unflatten(-1, (4, 8)).transpose(1, 2).clone()})
        )
    with torch.no_grad():
        high, low = lead(model, CORRUPT), lead(model, CLEAN)
        values, high, low = Fitted(handed), low, high
        for row, (layer, head) in enumerate(named.heads or ()):
            for place in (None, *range(6)):
                patch = Patch(values, None if place is None else (place,)).on(layer, head)
                with warnings.catch_warnings(), attach(model, patch) as run:
                    warnings.simplefilter("ignore", InactiveWarning)  # the texts begin alike
                    logits = run(input_ids=torch.tensor([CORRUPT])).logits[0, -1].double()
                share = (float(logits[RIGHT] - logits[WRONG]) - low) / (high - low)
                mine = whole.share[layer, head] if place is None else named.share[row, place]
                assert float(mine) == pytest.approx(share, rel=1e-3, abs=1e-5)


def test_a_pattern_over_the_values_of_the_corrupt_text(model: Any) -> None:
    layer, head = 1, 2
    named = trace(model, CLEAN, CORRUPT, RIGHT, WRONG, what="pattern", heads=[(layer, head)])
    whole = trace(model, CLEAN, CORRUPT, RIGHT, WRONG, what="pattern")
    with torch.no_grad():
        high, low = lead(model, CLEAN), lead(model, CORRUPT)
        value = seen(model, model.model.layers[layer].self_attn.v_proj, CORRUPT)[0].unflatten(-1, (2, 8))[:, head // 2]
        mixed = torch.zeros(1, 4, 6, 8)
        mixed[0, head] = patterns(model, CLEAN)[layer, head] @ value
        for place in (None, 2, 4, 5):
            patch = Patch(Fitted({str(layer): mixed}), None if place is None else (place,)).on(layer, head)
            with attach(model, patch) as run:
                logits = run(input_ids=torch.tensor([CORRUPT])).logits[0, -1].double()
            share = (float(logits[RIGHT] - logits[WRONG]) - low) / (high - low)
            mine = whole.share[layer, head] if place is None else named.share[0, place]
            assert float(mine) == pytest.approx(share, rel=1e-3, abs=1e-5)


def test_the_answer_is_the_clean_texts_likeliest(model: Any) -> None:
    logits = model(input_ids=torch.tensor([CLEAN])).logits[0, -1].detach()
    likeliest = int(logits.argmax())
    found = trace(model, CLEAN, CORRUPT)
    assert found.clean == pytest.approx(float(logits[likeliest]))
    assert torch.equal(found.share, trace(model, CLEAN, CORRUPT, likeliest).share)


@pytest.mark.parametrize("what", ["heads", "pattern"])
def test_a_layer_with_fewer_heads_brings_nothing_back_beyond_them(what: Any) -> None:
    found = trace(uneven(), CLEAN, CORRUPT, RIGHT, WRONG, what=what)
    assert found.share.isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert len(found.top(10)) == 6


def test_it_is_printed_drawn_and_shown() -> None:
    share = torch.tensor([[0.0, 0.9, -0.2], [0.1, 0.0, 0.0]])
    found = Trace(share, "residual", ["a", "<b>", "c"], None, 2.0, -1.0)
    assert found.top(2) == ((0, 1), (0, 2))
    assert str(found).splitlines()[1] == "   +90.0%  layer 0 at '1 <b>'"
    shown = found._repr_html_()
    assert "<b>c" not in shown
    assert "1 &lt;b&gt;: 90%" in shown
    assert "token 2 c: -20%" in shown
    heads = Trace(share, "heads", ["a", "<b>", "c"], None, 2.0, -1.0)
    assert str(heads).splitlines()[1] == "   +90.0%  0.1"
    assert "head 0.2: -20%" in heads._repr_html_()
    assert (heads.figure.low, heads.figure.high) == pytest.approx((-0.9, 0.9))
    few = Trace(torch.tensor([[0.25, -0.5, float("nan")]]), "pattern", ["a", "<b>", "c"], None, 2.0, -1.0)
    assert (few.figure.low, few.figure.high) == (-0.5, 0.5)
    named = Trace(share, "pattern", ["a", "<b>", "c"], ((3, 1), (4, 0)), 2.0, -1.0)
    assert "head 3.1 at '1 <b>'" in str(named)
    pytest.importorskip("plotly")
    for one in (found, heads, named):
        heat = one.plot().data[0]
        assert heat.zmax == -heat.zmin == pytest.approx(0.9)  # white at zero


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"what": "stream"}, "what = 'stream': must be 'residual', 'attention'"),
        ({"heads": [(0, 1)]}, "not what 'residual' is about"),
        ({"corrupt": CORRUPT[:5]}, "as many tokens as the clean text, 6"),
        ({"corrupt": CLEAN}, "more or less than the clean one"),
        ({"what": "heads", "heads": [(2, 0)]}, "of the model's 2 layers"),
        ({"what": "heads", "heads": [(0, 4)]}, "of the model's 2 layers"),
        ({"answer": 4096}, "must be a token from 0 to"),
        ({"instead": RIGHT}, "instead = .*begins with token .*, as the answer does"),
    ],
)
def test_says_what_is_wrong(model: Any, how: dict[str, Any], match: str) -> None:
    given = {"clean": CLEAN, "corrupt": CORRUPT, "answer": RIGHT} | how
    with pytest.raises(FieldError, match=match):
        trace(model, **given)


def test_an_mlp_that_is_no_summand_is_refused() -> None:
    with pytest.raises(RefusedModel, match="stands between attention and the stream"):
        trace(models.tiny("gemma2"), CLEAN, CORRUPT, what="mlp")


@torch.no_grad()
def test_a_norm_of_the_embeddings_is_none_within_the_stream() -> None:
    bloom = models.tiny("bloom")
    added = bloom.transformer.h[1].mlp.dense_4h_to_h
    clean = seen(bloom, added, CLEAN)
    with hooked(added, lambda x: torch.cat([x[:, :2], clean[:, 2:3], x[:, 3:]], 1)):
        patched = lead(bloom, CORRUPT)
    low = lead(bloom, CORRUPT)
    want = (patched - low) / (lead(bloom, CLEAN) - low)
    assert close_model(trace(bloom, CLEAN, CORRUPT, RIGHT, WRONG, what="mlp").share[1, 2], torch.tensor(want).double())


def test_a_pattern_is_put_in_at_its_own_rows_in_every_tile() -> None:
    model = models.tiny("llama").eval()
    heads, draw = model.config.num_attention_heads, torch.Generator().manual_seed(0)
    maps = torch.randn(1, heads, 11, 11, generator=draw).tril().exp().tril()
    values = Fitted({"0": maps / maps.sum(-1, keepdim=True)})
    here = torch.zeros(1, heads, 11, dtype=torch.bool)
    here[:, 1, 4:] = True
    put = KINDS["pattern"](values, Fitted({"here": here})).on(layers=0)
    ids = torch.randint(3, 100, (1, 11), generator=draw)
    with attach(model, put, backend="reference") as run:
        whole = run(input_ids=ids).logits
    with attach(model, put, backend="tiled", tile_rows=3) as run:
        assert close_model(run(input_ids=ids).logits, whole)
    assert not close_model(model(input_ids=ids).logits, whole)
