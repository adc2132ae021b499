"""Steer2Edit: a steering vector moved into the heads that carry it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import fit, models, operate
from heedful.authoring import Fitted, Layer
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import HeadWeights
from heedful.methods.intervene.language.steer2edit import Steer2Edit


def _weights(e: int = 6, h: int = 3, d: int = 4) -> HeadWeights:
    q, k, v, o = (torch.randn(*size, dtype=torch.float64) for size in ((h, d, e), (h, d, e), (h, d, e), (e, h, d)))
    return HeadWeights(q, k, v, o)


def _vectors(e: int = 6, h: int = 3, d: int = 4) -> Fitted:
    return Fitted({"v.0": torch.randn(e, dtype=torch.float64), "x.0": torch.randn(h, d, dtype=torch.float64)})


LAYER = Layer(number=0, heads=3, kv_heads=3, head_dim=4, value_dim=4, width=6)


@pytest.mark.parametrize(("rho", "alpha"), [(0.2, 0.0), (0.4, 0.5), (0.3, 0.9)])
def test_the_formula_head_by_head(rho: float, alpha: float) -> None:
    weights, vectors = _weights(), _vectors()
    found = Steer2Edit(rho, alpha, vectors).operate(weights, LAYER)
    v = vectors["v.0"] / vectors["v.0"].norm()
    for j in range(3):
        block = weights.o[:, j]
        written = block @ vectors["x.0"][j]
        g = float(v @ written / written.norm())
        k = block.T @ v / (block.T @ v).norm()
        strength = max(abs(g) - rho * alpha, 0.0) / (rho * (1 - alpha)) * (1 if g > 0 else -1)
        assert close(found.o[:, j], block + strength * torch.outer(v, k))
        if strength:  # whatever the head's sign, what it now writes on its mean input lies further along v
            assert float(v @ found.o[:, j] @ vectors["x.0"][j]) > float(v @ written)
    assert all(torch.equal(getattr(found, name), getattr(weights, name)) for name in ("q", "k", "v"))


def test_heads_below_the_threshold_stay_bit_for_bit() -> None:
    weights, vectors = _weights(), _vectors()
    cosine = [abs(x) for x in Steer2Edit(1e-9, 0.0, vectors).strengths(weights, 0).mul(1e-9).tolist()]
    least = cosine.index(min(cosine))
    edit = Steer2Edit(rho=sorted(cosine)[1] / 0.5 * 0.99, alpha=0.5, vectors=vectors)
    found = edit.operate(weights, LAYER)
    assert torch.equal(found.o[:, least], weights.o[:, least])
    assert all(not torch.equal(found.o[:, j], weights.o[:, j]) for j in range(3) if j != least)
    assert Steer2Edit.neutral().operate(weights, LAYER) is weights
    assert Steer2Edit(rho=1.9, alpha=0.5, vectors=vectors).operate(weights, LAYER) is weights


def _batches(model: torch.nn.Module) -> tuple[list[dict[str, Tensor]], Tensor]:
    inputs = models.tiny_inputs(model, batch=4, length=7)  # type: ignore[arg-type]
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, :3] = 0
    mask[3, 5:] = 0
    positive = torch.tensor([True, False, False, True])
    return [{"input_ids": inputs["input_ids"], "attention_mask": mask, "positive": positive}], mask


def _hooked(model: torch.nn.Module, batch: dict[str, Tensor], tokens: Tensor) -> Fitted:
    """Means of each output projection's inputs and outputs, text by text, without heedful."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.self_attn.o_proj.register_forward_hook(
            lambda _, args, out, i=i: seen.update({f"x.{i}": args[0].double(), f"v.{i}": out.double()})
        )
        for i, layer in enumerate(model.model.layers)  # type: ignore[union-attr, arg-type]
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    out = {}
    for name, x in seen.items():
        means = torch.stack([x[row][tokens[row].bool()].mean(0) for row in range(4)])
        yes, no = means[batch["positive"]].mean(0), means[~batch["positive"]].mean(0)
        out[name] = yes - no if name.startswith("v") else ((yes + no) / 2).view(4, -1)
    return Fitted(out)


@pytest.mark.parametrize("marked", [False, True])
def test_fitting_finds_the_means_of_hooks(marked: bool) -> None:
    model = models.tiny("llama")
    batches, tokens = _batches(model)
    if marked:
        tokens = torch.zeros(4, 7, dtype=torch.bool)
        tokens[:, 3:5] = True
        batches[0]["response"] = tokens
    fitted = fit(Steer2Edit(), model, batches)
    wanted = _hooked(model, batches[0], tokens)
    assert sorted(fitted.vectors) == sorted(wanted)
    for name, x in wanted.items():
        assert close(fitted.vectors[name].float(), x.float())
    assert fitted == fit(Steer2Edit(), model, batches)
    assert "positive" in batches[0]


def test_batches_split_as_one() -> None:
    model = models.tiny("llama")
    (batch,), _ = _batches(model)
    whole = fit(Steer2Edit(), model, [batch]).vectors
    rows = [{**{k: v[i : i + 1] for k, v in batch.items()}, "positive": bool(batch["positive"][i])} for i in range(4)]
    for name, x in fit(Steer2Edit(), model, rows).vectors.items():
        assert close(x.float(), whole[name].float())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_edited_model_runs_without_heedful(kind: str) -> None:
    model = models.tiny(kind)
    batches, _ = _batches(model)
    inputs = models.tiny_inputs(model)
    edited = operate(model, fit(Steer2Edit(rho=0.1, alpha=0.5), model, batches))
    with torch.no_grad():
        assert not torch.equal(edited(**inputs).logits, model(**inputs).logits)
    changed = [
        n for (n, a), b in zip(model.named_parameters(), edited.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert changed
    assert all(n.endswith(("o_proj.weight", "attention.output.dense.weight")) for n in changed)


def test_errors() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=r"Steer2Edit.rho = 0.0: must be above 0"):
        Steer2Edit(rho=0)
    with pytest.raises(FieldError, match=r"Steer2Edit.alpha = 1.0: must be 0 or more, and below 1"):
        Steer2Edit(alpha=1.0)
    with pytest.raises(FieldError, match="to texts with and without the trait, or seed be given"):
        operate(model, Steer2Edit())
    with pytest.raises(FieldError, match=r"need \[e\] = \[32\] and \[h d\] = \[4, 8\] in layer 0: fit to this model"):
        operate(model, Steer2Edit(vectors=_vectors()))
    with pytest.raises(FieldError, match="need 'positive' in each"):
        fit(Steer2Edit(), model, [models.tiny_inputs(model)])
    with pytest.raises(FieldError, match="must hold positive and other texts"):
        fit(Steer2Edit(), model, [{**models.tiny_inputs(model), "positive": True}])
    with pytest.raises(FieldError, match="must hold positive and other texts"):
        fit(Steer2Edit(), model, [])


def test_a_threshold_of_one_edits_nothing() -> None:
    """And so it needs no vectors, as no cosine lies above one."""
    weights = _weights()
    assert Steer2Edit(rho=2.0, alpha=0.5).operate(weights, LAYER) is weights


def test_random_vectors_are_the_seeds_own() -> None:
    weights = _weights()
    for seed, layer in ((3, 2), (0, 1), (1, 0)):
        random = torch.Generator().manual_seed(1_000_003 * seed + layer)
        v, x = torch.randn(6, generator=random).double(), torch.randn(3, 4, generator=random).double()
        found, _, cosine = Steer2Edit(seed=seed)._aligned(weights, layer)
        assert close(found, v / v.norm())
        written = torch.stack([weights.o[:, j] @ x[j] for j in range(3)])
        assert close(cosine, written @ v / (written.norm(dim=-1) * v.norm()))
