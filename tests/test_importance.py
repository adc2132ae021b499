"""What a head matters to the answers of a model, against hooks on the model's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.core.errors import FieldError, RefusedModel
from heedful.explaining import head_importance
from tests.test_ablation import by_hand
from tests.test_logits import IDS, stream


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
    assert (found.figure.low, found.figure.high) == (0.0, float(found.divergence.max()))
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


def test_an_answer_that_a_model_never_gives_moves_nothing() -> None:
    class Never(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, out: bool) -> Tensor:
            logits: Tensor = self.one(x, x, x, need_weights=False)[0]
            last = torch.full_like(logits[..., :1], -torch.inf)
            return torch.cat([logits, last], -1) if out else logits

    torch.manual_seed(0)
    model, x = Never().eval(), torch.randn(2, 5, 8)
    with_it, without = (head_importance(model, [{"x": x, "out": out}]) for out in (True, False))
    torch.testing.assert_close(with_it.divergence, without.divergence)


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
