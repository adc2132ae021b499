"""Sparsifiner: which keys its predictor picks, and what a fit teaches it, against the authors' steps in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.authoring import Fitted
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask
from heedful.core.regions import Region
from heedful.methods import Sparsifiner
from tests.by_hand import Steps

N, LOW, SHORT = 19, 6, 4
NAMES = ("query", "query_bias", "key", "key_bias", "down", "basis")


def _bare(cls: bool = True) -> Bare:
    bare = Bare(Shape(dv=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"cls": Region(((0, 1),))} if cls else {}, mask=Mask())
    return bare


def _parts() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(4)
    shapes = {"query": (SHORT, 8), "query_bias": (SHORT,), "key": (SHORT, 8), "key_bias": (SHORT,)}
    shapes |= {"down": (N, LOW), "basis": (N, LOW)}
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def _method(share: float, terms: int, least: float) -> Sparsifiner:
    found = Fitted({f"{name}.0": x for name, x in _parts().items()})
    return Sparsifiner(share, tokens_by=3, channels_by=2, terms=terms, least=least, predictor=found)


def _terms(q: Tensor, k: Tensor, p: dict[str, Tensor], heads: int) -> Tensor:
    """Of one head, `[n m]`."""
    short = [p["key"] @ key + p["key_bias"] for key in k]
    fewer = [sum(p["down"][j, m] * short[j] for j in range(len(k))) for m in range(p["down"].shape[1])]
    asked = [p["query"] @ query + p["query_bias"] for query in q]
    return torch.stack(
        [torch.stack([one @ other for other in fewer]).div(math.sqrt(heads)).softmax(0) for one in asked]
    )


def _by_hand(bare: Bare, many: int, terms: int, least: float, cls: bool) -> Tensor:
    s, p = bare.shape, _parts()
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b in range(s.b):
        for h in range(s.h):
            q, k, v = bare.q[b, h], bare.k[b, h // 2], bare.v[b, h // 2]
            found = _terms(q, k, p, s.h)
            for i in range(s.q):
                large = sorted(range(LOW), key=lambda m, row=found[i]: -row[m])[:terms]
                rank = []
                for j in range(s.k):
                    entries = [float(p["basis"][j, m].abs()) for m in range(LOW)]
                    rank.append(sum(float(found[i, m]) * entries[m] for m in large if entries[m] > least))
                seen = sorted(range(s.k), key=lambda j, rank=rank: -rank[j])[:many]
                if cls and i == 0:
                    seen = list(range(s.k))
                weights = torch.stack([q[i] @ k[j] / 8**0.5 for j in seen]).softmax(0)
                out[b, h, i] = weights @ v[seen]
    return out


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(
    ("share", "many", "terms", "least"), [(0.25, 5, 8, 0.02), (0.5, 10, 2, 0.5), (0.01, 1, 3, 0.0)]
)
def test_each_query_sees_the_keys_that_are_predicted(
    share: float, many: int, terms: int, least: float, cls: bool
) -> None:
    bare = _bare(cls)
    want = _by_hand(bare, many, terms, least, cls)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(_method(share, terms, least), backend, rows)
        assert close(found, want)


def test_all_keys_are_softmax_and_a_mask_is_not_narrowed() -> None:
    call = _bare().call
    assert Sparsifiner(1.0).idle(call)
    assert not Sparsifiner().idle(call)
    assert Sparsifiner().idle(replace(call, mask=Mask((Causal(),))))


def test_the_first_step_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sum of squares between the predicted rows and the true ones, the class token's left out."""
    model = models.tiny("vit", num_hidden_layers=1, image_size=16)
    inputs = models.tiny_inputs(model)
    kept = Steps(monkeypatch)
    found = fit(Sparsifiner(seed=1, steps=2, rate=1e-2, decay=0.1), model, [inputs])
    assert kept.settings[0] == {"lr": 1e-2, "weight_decay": 0.1}
    p = {name: x.requires_grad_() for name, x in zip(NAMES, kept.before[0], strict=True)}
    seen: list[tuple[Tensor, Tensor]] = []
    part = next(m for name, m in model.named_modules() if name.endswith("attention") and hasattr(m, "q_proj"))
    hook = part.register_forward_pre_hook(lambda m, given: seen.append((m.q_proj(given[0]), m.k_proj(given[0]))))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    heads, d = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    q, k = (x.unflatten(-1, (heads, d)).transpose(1, 2) for x in seen[0])
    loss = torch.zeros(())
    for b in range(len(q)):
        for h in range(heads):
            true = (q[b, h] @ k[b, h].T / d**0.5).softmax(-1)
            loss = loss + (_terms(q[b, h], k[b, h], p, heads) @ p["basis"].T - true)[1:].square().sum()
    for one, other in zip(kept.grads[0], torch.autograd.grad(loss, list(p.values())), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)
    assert found.predictor is not None
    assert set(found.predictor) == {f"{name}.0" for name in NAMES}
    assert len(kept.grads) == 2


def test_images_are_taken_in_turn_and_a_map_is_learned() -> None:
    model = models.tiny("vit", num_hidden_layers=1, image_size=16)
    batches = [models.tiny_inputs(model, seed=seed) for seed in range(2)]
    one, other, both = (fit(Sparsifiner(steps=2), model, given) for given in (batches[:1], batches[1:], batches))
    assert len({x.predictor for x in (one, other, both)}) == 3


def test_where_a_fit_begins() -> None:
    query = torch.zeros(1, 2, 60, 64)
    before = torch.get_rng_state()
    found = Sparsifiner(seed=3).parts(2, query)
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "query": (32, 64), "query_bias": (32,), "key": (32, 64), "key_bias": (32,), "down": (60, 10), "basis": (60, 10)
    }  # fmt: skip
    for name in ("query", "key"):
        assert 0.12 < float(found[name].max()) <= 1 / 8
        assert -1 / 8 <= float(found[name].min()) < -0.12
    for name in ("down", "basis"):
        assert 0.017 < float(found[name].std()) < 0.023
    assert not torch.equal(found["query"], found["key"])
    assert not torch.equal(found["down"], found["basis"])
    assert not torch.equal(found["query"], Sparsifiner(seed=3).parts(1, query)["query"])
    assert not torch.equal(found["query"], Sparsifiner(seed=4).parts(2, query)["query"])
    tiny = Sparsifiner(tokens_by=99, channels_by=99, seed=3).parts(0, query)
    assert tuple(tiny["down"].shape) == (60, 1)
    assert tuple(tiny["query"].shape) == (1, 64)


def test_an_image_model_is_served() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    found = fit(Sparsifiner(steps=1), model, [inputs])
    with torch.no_grad(), attach(model, found) as run:
        assert run.difference(**inputs) > 0


def test_what_cannot_be() -> None:
    for field, value in (
        ("share", 0.0), ("share", 1.1), ("tokens_by", 0), ("channels_by", 0), ("terms", 0), ("least", -0.1),
        ("steps", 0), ("rate", 0.0), ("decay", -0.1),
        ("rate", float("inf")), ("decay", float("inf")), ("least", float("inf")),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=rf"Sparsifiner\.{field} = {value}"):
            Sparsifiner(**{field: value})
    assert Sparsifiner() == Sparsifiner(0.25, 6, 2, 8, 0.02, None, None, 500, 3e-4, 0.05)
    assert Sparsifiner(least=0.0, decay=0.0).steps == 500
    query = torch.zeros(1, 2, N, 8)
    with pytest.raises(FieldError, match=r"predictor = None: must be fitted with heedful.fit\(\), or seed be given"):
        Sparsifiner().parts(0, query)
    for layer, tokens in ((1, N), (0, N + 1)):
        with pytest.raises(
            FieldError, match=rf"was fitted to another model, and layer {layer} has {tokens} tokens and"
        ):
            _method(0.25, 8, 0.02).parts(layer, torch.zeros(1, 2, tokens, 8))
    model = models.tiny("vit")
    with pytest.raises(FieldError, match=r"batches = 0: must be 1 or more"):
        fit(Sparsifiner(), model, [])
    text = models.tiny("llama")
    with pytest.raises(FieldError, match="must be read by a layer whose tokens see all others"):
        fit(Sparsifiner(), text, [models.tiny_inputs(text)])
    with pytest.raises(SiteError, match="queries and keys are known from MASK on"):
        _method(0.25, 8, 0.02).narrow(Mask(), _bare().call)
