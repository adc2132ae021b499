"""PruneHeads: importance by gradient, and which groups go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import Method, Site, attach, fit, fold, models, operate
from heedful.authoring import Call, Fitted, at
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, FoldError
from heedful.core.kinds.weights import HeadWeights
from heedful.methods.compress.prune.prune_heads import PAPER, PruneHeads


class Factor(Method):
    """One group of heads times a factor."""

    paper = PAPER
    group: int = 0
    by: float = 0.0

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        size = call.heads // call.kv_heads
        out = heads.clone()
        out[:, self.group * size : (self.group + 1) * size] *= self.by
        return out


def _by_hooks(model: Any, ids: Tensor) -> Tensor:
    """|sum over positions of head . dL/dhead| of each group, text by text, from the projections' inputs."""
    out = torch.zeros(2, 2, dtype=torch.float64)
    for row in ids:
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: Any, seen: list[Tensor] = seen) -> None:
            args[0].retain_grad()
            seen.append(args[0])

        handles = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for handle in handles:
            handle.remove()
        for layer, x in enumerate(seen):
            out[layer] += (x * x.grad).view(-1, 2, 16).sum((0, 2)).abs()  # 2 groups of 2 heads of width 8
    return torch.nn.functional.normalize(out, dim=-1)


def test_importance_is_the_gradient_of_each_text() -> None:
    model = models.tiny("llama", dtype=torch.float64)
    ids = models.tiny_inputs(model, batch=3)["input_ids"]
    found = fit(PruneHeads(), model, [{"input_ids": ids}]).importance
    wanted = _by_hooks(model, ids)
    for layer in range(2):
        assert close_model(found[str(layer)].float(), wanted[layer].float())


def test_one_batch_or_many_padded_or_not() -> None:
    model = models.tiny("llama", dtype=torch.float64)
    ids = models.tiny_inputs(model, batch=4)["input_ids"]
    whole = fit(PruneHeads(), model, [{"input_ids": ids}]).importance
    pieces = fit(PruneHeads(), model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]).importance
    right = {"input_ids": torch.cat([ids, torch.zeros_like(ids[:, :3])], 1)}
    right["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :3])], 1)
    padded = fit(PruneHeads(), model, [right]).importance
    for name, x in whole.items():
        assert close(pieces[name], x)
        assert close(padded[name], x)
        assert close(x.norm(), torch.ones((), dtype=x.dtype))


def test_fitting_leaves_the_model_alone() -> None:
    model = models.tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(PruneHeads(), model, [models.tiny_inputs(model)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def _fitted(**more: Any) -> PruneHeads:
    tensors = {"0": torch.tensor([0.1, 0.2, 0.9, 0.3]), "1": torch.tensor([0.05, 0.06, 0.07, 0.08])}
    return PruneHeads(importance=Fitted(tensors), **more)


def test_the_least_important_go_first_and_each_layer_keeps_its_best() -> None:
    for form in ("uneven", "zeros"):
        assert _fitted(share=0.0, form=form).dropped() == ()
        assert _fitted(share=0.25, form=form).dropped() == ((1, 0), (1, 1))
        assert _fitted(share=0.5, form=form).dropped() == ((1, 0), (1, 1), (1, 2), (0, 0))
        assert _fitted(share=1.0, form=form).dropped() == ((1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (0, 3))
    assert _fitted(groups=((1, 3),)).dropped() == ((1, 3),)


def test_each_layer_loses_equally_many() -> None:
    assert _fitted(share=0.0).dropped() == ()
    assert _fitted(share=0.25).dropped() == ((0, 0), (1, 0))
    assert _fitted(share=0.6).dropped() == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert _fitted(share=1.0).dropped() == ((0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 2))
    with pytest.raises(FieldError, match=r"share = 0.1: drops none of a layer's 4 groups, of which one always stays"):
        _fitted(share=0.1).dropped()


@pytest.mark.parametrize("form", ["even", "uneven", "zeros"])
@pytest.mark.parametrize("kind", ["llama", "mha", "bert"])
def test_a_pruned_model_is_the_model_with_those_heads_at_zero(kind: str, form: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    fitted = fit(PruneHeads(0.5 if form == "even" else 0.25, form=form), model, [inputs])
    gone = fitted.dropped()
    whole = {"llama": 2, "mha": 4, "bert": 4}[kind]
    assert len(gone) == (whole if form == "even" else whole // 2)
    stack = Factor(gone[0][1]).on(layers=gone[0][0])
    for layer, group in gone[1:]:
        stack = stack | Factor(group).on(layers=layer)
    with torch.no_grad(), attach(model, stack) as run:
        wanted = run(**inputs).logits
    small = operate(model, fitted)
    with torch.no_grad():
        assert close_model(small(**inputs).logits, wanted)
    assert (small.num_parameters() < model.num_parameters()) == (form != "zeros")


@pytest.mark.parametrize(
    ("kind", "form"), [("llama", "even"), ("mha", "even"), ("qwen3", "even"), ("llama", "zeros"), ("bert", "zeros")]
)
def test_a_pruned_model_saves_and_loads(kind: str, form: str, tmp_path: Path) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    fitted = fit(PruneHeads(0.5, form=form), model, [inputs])
    small = operate(model, fitted)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        found = again(**inputs).logits
        assert torch.equal(found, small(**inputs).logits)
        assert torch.equal(found, fold(model, fitted)(**inputs).logits)
        assert not close_model(found, model(**inputs).logits)
    assert again.num_parameters() == small.num_parameters()
    if form == "even":
        assert again.config.num_attention_heads == model.config.num_attention_heads // 2
        assert model.config.num_attention_heads == 4  # the config of the model it was given stays
    if kind != "bert":
        how = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(again.generate(**inputs, **how), small.generate(**inputs, **how))


@pytest.mark.parametrize(
    ("kind", "form", "reason"),
    [
        ("llama", "uneven", "its layers keep 1 to 2 key heads, and its config has one count for all of them"),
        ("bert", "even", "its config has no way to tell heads of another width"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_folded(kind: str, form: str, reason: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    fitted = fit(PruneHeads(0.25 if form == "uneven" else 0.5, form=form), model, [inputs])
    with pytest.raises(FoldError, match=reason):
        fold(model, fitted)
    small = operate(model, fitted)  # in memory all is well
    assert small.config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        assert small(**inputs).logits.isfinite().all()


def test_errors() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=r"PruneHeads.share = 1.5: must lie from 0 to 1"):
        PruneHeads(1.5)
    with pytest.raises(FieldError, match=r"PruneHeads.groups = .*: each must be a pair of layer and head"):
        PruneHeads(groups=((0, -1),))
    with pytest.raises(FieldError, match=r"PruneHeads.form = 'odd': must be 'even', 'uneven' or 'zeros'"):
        PruneHeads(form="odd")
    with pytest.raises(FieldError, match=r"PruneHeads.importance = None: is not known yet: fit, or name `groups`"):
        operate(model, PruneHeads())
    with pytest.raises(FieldError, match=r"name key head 2 of layer 0, which has 2"):
        operate(model, PruneHeads(groups=((0, 2),)))
    with pytest.raises(FieldError, match="leave layer 1 no head"):
        operate(model, PruneHeads(groups=((1, 0), (1, 1))))
    with pytest.raises(FieldError, match="must reach every layer"):
        fit(PruneHeads(), model, [])
    with pytest.raises(FieldError, match="give this model no loss; add"):
        fit(PruneHeads(), model, [{"inputs_embeds": torch.randn(1, 4, 32)}])


def test_a_layer_too_small_to_lose_a_group_keeps_it() -> None:
    importance = Fitted({"0": torch.tensor([0.4, 0.1, 0.3, 0.2]), "1": torch.tensor([0.5])})
    assert PruneHeads(0.5, importance=importance).dropped() == ((0, 1), (0, 3))


def test_a_text_counts_alike_in_batches_of_unlike_sizes() -> None:
    model = models.tiny("llama", dtype=torch.float64)
    ids = models.tiny_inputs(model, batch=3)["input_ids"]
    found = fit(PruneHeads(), model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]).importance
    wanted = _by_hooks(model, ids)
    for layer in range(2):
        assert close_model(found[str(layer)].float(), wanted[layer].float())


def test_what_is_silenced_keeps_its_shape() -> None:
    weights = HeadWeights(torch.randn(4, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(5, 4, 3))
    found = PruneHeads(groups=((0, 1),), form="zeros").operate(weights, Layer(0, 4, 2, 3, 3, 5)).o
    assert torch.equal(found, torch.cat([weights.o[:, :2], torch.zeros(5, 2, 3)], 1))
