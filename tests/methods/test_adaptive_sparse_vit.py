"""AdaptiveSparseViT against a vision transformer written out: what is dropped at rest, what a step of training sees."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.regions import Region
from heedful.methods import AdaptiveSparseViT
from heedful.methods.sparse.merge.adaptive_sparse_vit import _free

LABELS = torch.tensor([0, 1, 1])


def image_model() -> tuple[Any, dict[str, Tensor]]:
    model = models.tiny("vit", num_hidden_layers=4, image_size=16, attn_implementation="eager")
    return model, models.tiny_inputs(model, batch=3)


def attended(part: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What attention adds to tokens `[n e]`, the weights of the first `[h n]`, and what heads hand over `[h n d]`.

    What a key gets, before all that a query gives is made 1, is multiplied by the mask, as the authors do.
    """
    heads = part.num_attention_heads
    q, k, v = (m(x).unflatten(-1, (heads, -1)).transpose(0, 1) for m in (part.q_proj, part.k_proj, part.v_proj))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).exp() * mask
    weights = weights / weights.sum(-1, keepdim=True)
    out = weights @ v
    return part.o_proj(out.transpose(0, 1).flatten(1)), weights[:, 0], out


def scores(first: Tensor, out: Tensor, stays: list[Any]) -> list[Tensor]:
    """Of each patch: what the class token gives it, a head counted by its share of what all hand over there."""
    heads, n, _ = out.shape
    given = []
    for i in range(1, n):
        norms = [out[h, i].norm() for h in range(heads)]
        given.append(sum(first[h, i] * norms[h] / sum(norms) for h in range(heads)))
    mean = sum(given) / sum(stays)
    return [x / mean for x in given]


def at_rest(model: Any, pixels: Tensor, thresholds: dict[int, float]) -> tuple[Tensor, list[int]]:
    x, counts = model.vit.embeddings(pixels[None])[0], []
    for number, layer in enumerate(model.vit.layers):
        counts.append(len(x))
        added, first, out = attended(layer.attention, layer.layernorm_before(x), torch.ones(len(x)))
        x = x + added
        x = x + layer.mlp(layer.layernorm_after(x))
        if number in thresholds:
            score = scores(first, out, [1.0] * (len(x) - 1))
            x = x[[0, *(1 + i for i, s in enumerate(score) if float(s) > thresholds[number])]]
    return model.classifier(model.vit.layernorm(x)[0]), counts


@pytest.mark.parametrize("start", [0.5, 0.8, 1.0])
@torch.no_grad()
def test_patches_below_the_threshold_are_gone(start: float) -> None:
    model, inputs = image_model()
    counts: list[int] = []
    hooks = [x.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1])) for x in model.vit.layers]
    with attach(model, AdaptiveSparseViT((0, 2), start=start)) as run:
        found = run(**inputs).logits
        assert run.active
    wanted = [at_rest(model, pixels, {0: start, 2: start}) for pixels in inputs["pixel_values"]]
    for hook in hooks:
        hook.remove()
    assert close_model(found, torch.stack([x for x, _ in wanted]))
    assert counts[:4] == [max(at) for at in zip(*(mine for _, mine in wanted), strict=True)]
    assert len({tuple(mine) for _, mine in wanted}) > 1  # each image has its own number


@torch.no_grad()
def test_no_threshold_drops_nothing_and_a_high_one_all_but_the_class_token() -> None:
    model, inputs = image_model()
    none = AdaptiveSparseViT((0, 1), start=-1.0)
    with pytest.warns(InactiveWarning), attach(model, none, backend="reference") as run:
        assert torch.equal(run(**inputs).logits, model(**inputs).logits)
    with attach(model, AdaptiveSparseViT((0,), start=1e9)) as run:
        found = run(**inputs).logits
    want = torch.stack([at_rest(model, pixels, {0: 1e9})[0] for pixels in inputs["pixel_values"]])
    assert close_model(found, want)


@torch.no_grad()
def test_the_first_token_stays_whatever_it_is() -> None:
    model = models.tiny("bert")
    counts: list[int] = []
    hook = model.bert.encoder.layer[1].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    with attach(model, AdaptiveSparseViT((0,), start=1e9)) as run:
        run(**models.tiny_inputs(model, length=5))
    hook.remove()
    assert counts == [1]


def training_loss(model: Any, inputs: dict[str, Tensor], thresholds: dict[int, Tensor], budget: float) -> Tensor:
    """Cross-entropy, and twice the distance of the mean share of patches from the budget.

    The authors' mask is zero or one, and has the gradient of a soft one.
    """
    logits = []
    shares: list[list[Tensor]] = []
    for pixels in inputs["pixel_values"]:
        x = model.vit.embeddings(pixels[None])[0]
        still, mine = torch.ones(len(x)), []
        for number, layer in enumerate(model.vit.layers):
            mine.append(still[1:].mean())
            added, first, out = attended(layer.attention, layer.layernorm_before(x), still)
            x = x + added
            x = x + layer.mlp(layer.layernorm_after(x))
            if number in thresholds:
                score = torch.stack(scores(first, out, list(still[1:])))
                soft = torch.sigmoid(50 * (score - thresholds[number]))
                hard = (score > thresholds[number]).float() - soft.detach() + soft
                still = torch.cat([torch.ones(1), hard])
        shares.append(mine)
        logits.append(model.classifier(model.vit.layernorm(x)[0]))
    share = sum(torch.stack([mine[i] for mine in shares]).mean() for i in range(4)) / 4
    return torch.nn.functional.cross_entropy(torch.stack(logits), LABELS) + 2 * (share - budget).abs()


def test_what_patches_cost_is_told_where_an_encoder_ends_whatever_comes_behind() -> None:
    model = models.tiny("llava").train()
    inputs, method, found = models.tiny_inputs(model), AdaptiveSparseViT((0,), start=0.9), []
    for what, only in ((method.on(layers=(0, 1)), None), (method, ("model.vision_tower",))):
        with attach(model, what, only=only) as run:
            run(**inputs)
            found.append(run.loss())
    assert torch.equal(*found)
    assert bool(found[0])


@pytest.mark.parametrize("budget", [0.6, 0.9])
def test_a_step_of_training(budget: float) -> None:
    model, inputs = image_model()
    model.train()
    with attach(model, AdaptiveSparseViT((0, 1), budget, start=0.9)) as run:
        learned: dict[int, Any] = {layer: run.state.params[0, layer]["threshold"] for layer in (0, 1)}
        loss = run(**inputs, labels=LABELS).loss
        loss.backward()
        grads = {layer: x.grad.clone() for layer, x in learned.items()}
        weight = model.vit.layers[0].attention.v_proj.weight
        mine = weight.grad.clone()
    model.zero_grad()
    thresholds = {layer: torch.tensor([0.9], requires_grad=True) for layer in (0, 1)}
    want = training_loss(model, inputs, thresholds, budget)
    want.backward()
    assert close(loss.detach(), want.detach())
    for layer, x in thresholds.items():
        assert x.grad is not None
        assert bool(x.grad.any())
        assert close_model(grads[layer], x.grad)
    assert close_model(mine, weight.grad)


def test_without_a_weight_the_budget_counts_for_nothing() -> None:
    model, inputs = image_model()
    model.train()
    losses = []
    for budget in (0.2, 0.9):
        with attach(model, AdaptiveSparseViT((0, 1), budget, weight=0.0)) as run:
            losses.append(float(run(**inputs, labels=LABELS).loss.detach()))
    assert losses[0] == losses[1]


@torch.no_grad()
@pytest.mark.parametrize("sharpness", [1.0, 50.0])
def test_what_is_masked_in_training_is_gone_at_rest(sharpness: float) -> None:
    model, inputs = image_model()
    method = AdaptiveSparseViT((0,), start=0.8, sharpness=sharpness)
    with attach(model, method) as run:
        rest = run(**inputs).logits
        model.train()
        trained = run(**inputs).logits
    model.eval()
    assert close_model(trained, rest)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", ()), ("layers", (-1,)), ("budget", 0.0), ("budget", 1.5), ("weight", -1.0), ("sharpness", 0.0),
    ],
)  # fmt: skip
def test_bad_fields(field: str, value: Any) -> None:
    with pytest.raises(FieldError, match=field):
        AdaptiveSparseViT(**{field: value})


def test_thresholds_begin_where_they_are_told() -> None:
    model, _ = image_model()
    with attach(model, AdaptiveSparseViT((1, 3), start=0.25)) as run:
        found = {layer: x["threshold"].tolist() for (_, layer), x in run.state.params.items() if x}
    assert found == {1: [0.25], 3: [0.25]}
    assert math.isclose(AdaptiveSparseViT().start, 0.5)


@torch.no_grad()
def test_a_patch_at_the_threshold_itself_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = image_model()
    one, scored, seen = inputs["pixel_values"][:1], AdaptiveSparseViT.scored, []

    def told(self: AdaptiveSparseViT, *given: Any) -> Tensor:
        seen.append(scored(self, *given))
        return seen[-1]

    monkeypatch.setattr(AdaptiveSparseViT, "scored", told)
    with pytest.warns(InactiveWarning), attach(model, AdaptiveSparseViT((0,), start=-1.0)) as run:
        run(pixel_values=one)
    patches = seen[0][0, 1:].sort().values
    counts: list[int] = []
    hook = model.vit.layers[1].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    with attach(model, AdaptiveSparseViT((0,), start=float(patches[5]))) as run:
        run(pixel_values=one)
    hook.remove()
    assert counts[0] == 1 + len(patches) - 6


def test_the_first_token_is_no_patch_though_it_is_called_one() -> None:
    call = Bare(Shape(b=1, q=5, k=5), rules=()).call
    assert _free(1, replace(call, roles={"patches": Region(((0, 4),))})).tolist() == [[False, True, True, True, False]]
