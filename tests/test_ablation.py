"""Ablation, and what a head matters, against hooks on the model's own modules; and which heads may be named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, RefusedModel
from heedful.explaining import head_importance
from tests.test_diagnose_texts import characters
from tests.test_logits import IDS, stream


def by_hand(model: Any, ids: Tensor, heads: dict[int, list[int]], value: Tensor | None) -> Tensor:
    """Logits with some slices of what enters the output projections replaced."""
    hooks, count = [], model.config.num_attention_heads
    for layer, chosen in heads.items():

        def put(module: Any, args: Any, layer: int = layer, chosen: list[int] = chosen) -> Any:
            x = args[0].clone().unflatten(-1, (count, -1))
            for head in chosen:
                x[..., head, :] = 0.0 if value is None else value[layer].unflatten(-1, (count, -1))[head].to(x)
            return (x.flatten(-2),)

        hooks.append(model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(put))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None]).logits
    for hook in hooks:
        hook.remove()
    return logits


def test_ablation_is_zeros_or_means_at_the_output_projection() -> None:
    model = models.tiny("llama")
    with heedful.ablate(model, [(1, 0), (0, 2), (1, 3)]) as run, torch.no_grad():
        found = run(input_ids=IDS[None]).logits
    torch.testing.assert_close(found, by_hand(model, IDS, {0: [2], 1: [0, 3]}, None))
    texts = [torch.arange(20, 40), torch.arange(7, 14)]
    means = torch.cat([stream(model, text)[1] for text in texts], 1).mean(1)
    with heedful.ablate(model, [(1, 0), (0, 2), (1, 3)], mean=texts) as run, torch.no_grad():
        found = run(input_ids=IDS[None]).logits
    torch.testing.assert_close(found, by_hand(model, IDS, {0: [2], 1: [0, 3]}, means))


@pytest.mark.parametrize("mean", [None, torch.arange(20, 40)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_ablation_goes_into_the_weights(kind: str, mean: Tensor | None) -> None:
    model = models.tiny(kind)
    with heedful.ablate(model, [(1, 0), (0, 2), (1, 3)], mean=mean) as run, torch.no_grad():
        wanted, stack = run(input_ids=IDS[None]).logits, run.stack
    with torch.no_grad():
        found = heedful.fold(model, stack)(input_ids=IDS[None]).logits
    assert close_model(found, wanted)
    assert not close_model(model(input_ids=IDS[None]).logits, wanted)


def test_means_of_a_real_text_are_what_heads_of_a_real_model_hand_over(default_model: models.Loaded) -> None:
    heads, text = {1: [0], 18: [6, 8]}, "When Mary and John went to the store, John gave a drink to"
    mean = ["Marta bought it for eleven crowns."]
    model, ids = default_model.model, [default_model.tokenizer(t, return_tensors="pt").input_ids[0] for t in mean]
    means = torch.cat([stream(model, one)[1] for one in ids], 1).mean(1)
    asked = default_model.tokenizer(text, return_tensors="pt")
    pairs = [(layer, head) for layer, mine in heads.items() for head in mine]
    with heedful.ablate(default_model, pairs, mean=mean) as run, torch.no_grad():
        found = run(**asked).logits
    wanted = by_hand(model, asked.input_ids[0], heads, means)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        plain = model(**asked).logits
    assert float((wanted - plain).abs().max()) > 0.1


def test_means_leave_padding_out_and_take_one_text_of_any_form() -> None:
    model, words = models.tiny("llama"), characters()
    padded = {"input_ids": torch.tensor([[20, 21, 22, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}

    def logits(mean: Any, **more: Any) -> Tensor:
        with heedful.ablate(model, [(1, 2)], mean=mean, **more) as run, torch.no_grad():
            found: Tensor = run(input_ids=IDS[None]).logits
        return found

    torch.testing.assert_close(logits(padded), logits([20, 21, 22]))
    both = {"input_ids": torch.tensor([[20, 21, 22], [9, 30, 31]])}
    torch.testing.assert_close(logits(both), logits([[20, 21, 22], [9, 30, 31]]))
    torch.testing.assert_close(logits("cat", tokenizer=words), logits(["cat"], tokenizer=words))
    torch.testing.assert_close(logits(torch.tensor([20, 21, 22])), logits([[20, 21, 22]]))


def test_heads_are_pairs() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=r"heads = .*must be (pairs of layer and head|Iterable)"):
        heedful.ablate(model, [3])  # type: ignore[list-item]
    with pytest.raises(FieldError, match="heads = 9: must be below 4, the heads of layer 1"):
        heedful.ablate(models.tiny("llama"), [(0, 1), (1, 9)])
    with pytest.raises(FieldError, match="names none"):
        heedful.ablate(model, [])
    with pytest.raises(FieldError, match="text = 5: must be one text"):
        heedful.ablate(model, [(1, 3)], mean=["cat", 5], tokenizer=characters())


@pytest.mark.parametrize("heads", [[[1, 3]], torch.tensor([[1, 3]]), torch.tensor([[1, 3]]).numpy()])
def test_pairs_may_come_from_a_list_or_a_table(heads: Any) -> None:
    model = models.tiny("llama")
    with heedful.ablate(model, heads) as run:
        assert repr(run.stack).endswith("on(layers=[1], heads=[3])")
    assert heedful.patterns(model, IDS, heads=heads).heads == {1: [3]}


@pytest.mark.parametrize("heads", [{1: [3]}, 3, [3], [(1.5, 0)], [(1, 2, 3)], [(-1, 0)]])
def test_what_is_no_pair_is_named(heads: Any) -> None:
    for act in (heedful.ablate, lambda model, heads: heedful.patterns(model, IDS, heads=heads)):
        with pytest.raises(FieldError, match=r"must be (pairs of layer and head|Iterable)"):
            act(models.tiny("llama"), heads)


def moved(whole: Tensor, without: Tensor) -> tuple[float, float]:
    """Divergence, and what the likeliest answer loses, of logits `[answers v]`, one answer at a time."""
    divergence = lost = 0.0
    for one, other in zip(whole.double(), without.double(), strict=True):
        p, q = one.softmax(0), other.softmax(0)
        divergence += float((p * (p / q).log()).sum())
        lost += float(p.max() - q[int(one.argmax())])
    return divergence / len(whole), lost / len(whole)


@pytest.mark.parametrize("mean", [None, torch.arange(20, 40)])
def test_importance_is_what_one_head_alone_changes(mean: Tensor | None) -> None:
    model = models.tiny("llama")
    value = None if mean is None else stream(model, mean)[1].mean(1)
    texts = [IDS, IDS[:5].flip(0)]
    found = head_importance(model, [{"input_ids": ids[None], "labels": ids[None]} for ids in texts], mean=mean)
    assert found.divergence.shape == (2, 4)
    assert found.loss is not None
    for layer, head in [(0, 0), (0, 2), (1, 3)]:
        total, sizes = torch.zeros(3, dtype=torch.float64), 0
        for ids in texts:
            with torch.no_grad():
                plain = model(input_ids=ids[None]).logits[0]
            other = by_hand(model, ids, {layer: [head]}, value)[0]
            rise = [torch.nn.functional.cross_entropy(x[:-1].double(), ids[1:]) for x in (other, plain)]
            total += torch.tensor([*moved(plain, other), float(rise[0] - rise[1])]) * len(ids)
            sizes += len(ids)
        row = torch.stack([found.divergence, found.probability, found.loss])[:, layer, head]
        torch.testing.assert_close(row.float(), (total / sizes).float())
    order = found.divergence.flatten().argsort(descending=True)[:3].tolist()
    assert found.top(3) == tuple(divmod(i, 4) for i in order)
    assert found.figure.high == float(found.divergence.max())
    assert "nats" in repr(found)
    assert ", loss" in repr(found)


def test_importance_leaves_padding_out_and_reads_what_a_decoder_writes() -> None:
    model = models.tiny("llama")
    padded = {"input_ids": torch.tensor([[20, 21, 22, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    alone, found = (head_importance(model, [b]) for b in ({"input_ids": torch.tensor([[20, 21, 22]])}, padded))
    assert found.loss is None
    assert ", loss" not in repr(found)
    torch.testing.assert_close(found.divergence.float(), alone.divergence.float())
    t5 = models.tiny("t5")
    inputs = models.tiny_inputs(t5, length=6)
    inputs = {name: x[:1] for name, x in inputs.items() if name.endswith("input_ids")}
    hidden = torch.ones_like(inputs["input_ids"])
    hidden[:, -1] = 0
    pad = {"attention_mask": hidden}  # of the encoder; what is written has as many tokens
    short = {"input_ids": inputs["input_ids"][:, :-1], "decoder_input_ids": inputs["decoder_input_ids"]}
    whole, cut = (head_importance(t5, [given]).divergence.float() for given in (inputs | pad, short))
    torch.testing.assert_close(whole, cut)


def test_importance_of_heads_of_a_plain_module_and_of_layers_of_unlike_numbers() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.two = torch.nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = x + self.one(x, x, x, need_weights=False)[0]
            x = x + self.two(x, x, x, need_weights=False)[0]
            return x.mean(1) if attention_mask is None else x

    told: list[Any] = []
    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(3, 5, 8)
    found = head_importance(model, [{"x": x}], progress=told.append)
    assert found.divergence.isnan().tolist() == [[False, False, True, True], [False] * 4]
    assert len(found.top(99)) == 6
    assert found.figure.high == float(found.divergence.nan_to_num(0.0).max()) < 1
    assert [(p.done, p.total) for p in told] == [(1, 2), (2, 2)]
    with heedful.ablate(model, [(0, 1)]) as run, torch.no_grad():
        without = run(x=x)
    with torch.no_grad():
        wanted = moved(model(x), without)
    torch.testing.assert_close(
        torch.stack([found.divergence, found.probability])[:, 0, 1].float(), torch.tensor(wanted)
    )
    mask = torch.tensor([[1, 1, 1, 1, 0]]).expand(3, -1)
    padded = head_importance(model, [{"x": x, "attention_mask": mask}])
    with heedful.ablate(model, [(0, 1)]) as run, torch.no_grad():
        without = run(x=x, attention_mask=mask)
    with torch.no_grad():
        wanted = moved(model(x, mask)[:, :4].flatten(0, 1), without[:, :4].flatten(0, 1))
    torch.testing.assert_close(padded.divergence[0, 1].float(), torch.tensor(wanted[0]))


def test_importance_of_logits_by_name_and_of_labels_that_some_batches_have() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, named: bool) -> Any:
            logits = self.one(x, x, x, need_weights=False)[0].mean(1)
            return {"logits": logits, "loss": logits.square().mean()} if named else logits

    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(3, 5, 8)
    named, bare = (head_importance(model, [{"x": x, "named": it}]) for it in (True, False))
    torch.testing.assert_close(named.divergence, bare.divergence)
    assert bare.loss is None
    assert named.loss is not None
    with heedful.ablate(model, [(0, 1)]) as run, torch.no_grad():
        without = run(x=x, named=True)["loss"]
    rise = without - model(x, True)["loss"].detach()
    torch.testing.assert_close(named.loss[0, 1].float(), rise)
    assert head_importance(model, [{"x": x, "named": it} for it in (True, False)]).loss is None


def test_importance_of_a_model_that_trains_and_of_a_head_that_hands_over_nothing() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.drop = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x + self.one(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Own(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.one.in_proj_weight[16:20] = 0.0  # the first head's values
    batches = [{"x": x}]
    found = head_importance(model, batches)
    assert model.drop.training
    torch.testing.assert_close(found.divergence, head_importance(model.eval(), batches).divergence)
    assert found.divergence[0, 0] == 0
    assert found.divergence[0, 1] > 0


def test_importance_says_what_is_wrong() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match="1 or more"):
        head_importance(model, [])
    with pytest.raises(FieldError, match="by name"):
        head_importance(model, IDS[None])  # type: ignore[arg-type]
    with pytest.raises(RefusedModel, match="gives no logits"):
        head_importance(model.model, [{"input_ids": IDS[None]}])
    with pytest.raises(FieldError, match="labels that count"):
        head_importance(model, [{"input_ids": IDS[None], "labels": torch.full_like(IDS[None], -100)}])
    with pytest.raises(FieldError, match=r"one without answers'?: must hold a token that is no padding"):
        head_importance(model, [{"input_ids": IDS[None], "attention_mask": torch.zeros_like(IDS[None])}])
    one = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.nn.Linear(8, 1))
    with pytest.raises(RefusedModel, match="Sequential gives one number, and the importance"):
        head_importance(one.eval(), [{"input": torch.zeros(1, 3, 8)}])
    with pytest.raises(FieldError, match="must hold what Linear is called with, by name: input; for example"):
        head_importance(torch.nn.Linear(2, 2), [{"input_ids": IDS[None]}])
    with pytest.raises(FieldError, match="names no text"):
        head_importance(model, [{"input_ids": IDS[None]}], mean=[])
    with pytest.raises(FieldError, match="1 head or more"):
        head_importance(model, [{"input_ids": IDS[None]}]).top(0)
