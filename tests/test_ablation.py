"""Ablation against hooks on the model's own modules; and which heads may be named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
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
    with pytest.raises(FieldError, match="mean = 5: must be texts"):
        heedful.ablate(model, [(1, 3)], mean=5)
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
