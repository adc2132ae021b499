"""Conversions: the first step of both stages written out, and what is left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful import attach, models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.kinds.conversion import Progress
from heedful.methods import (
    AttentionEditing,
    GatedHeads,
    GatedNorm,
    LLNAttention,
    MultiQueryAttention,
    SinkWindow,
    TempScale,
)
from tests.by_hand import Steps

TARGET = SinkWindow(1, 2) | GatedHeads(start=0.3)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
PADDED = {"input_ids": IDS, "attention_mask": MASK}


def llama() -> Any:
    torch.manual_seed(5)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = models.tiny("llama", vocab_size=12, tie_word_embeddings=False, **sizes)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(8)
            layer.self_attn.q_proj.weight.mul_(8)
    return model


def turned(x: Tensor, place: int, base: float = 10000.0) -> Tensor:
    """A head's vector `[d]` by the rotary embedding."""
    d = len(x)
    angle = torch.tensor([place * base ** (-2 * (i % (d // 2)) / d) for i in range(d)])
    return x * angle.cos() + torch.cat([-x[d // 2 :], x[: d // 2]]) * angle.sin()


def attention(part: Any, y: Tensor, gates: tuple[Tensor, Tensor] | None) -> Tensor:
    """One text `[n e]` through a layer's attention, in loops; with gates also a sink and a window of two."""
    n, rows = len(y), []
    q, k, v = (p(y).view(n, -1, 4) for p in (part.q_proj, part.k_proj, part.v_proj))
    for i in range(n):
        heads = []
        for h in range(4):
            seen = [j for j in range(i + 1) if gates is None or j < 1 or i - j < 2]
            scores = torch.stack([turned(q[i, h], i) @ turned(k[j, h // 2], j) / 2 for j in seen])
            head = sum(w * v[j, h // 2] for w, j in zip(scores.softmax(0), seen, strict=True))
            if gates is not None:
                head = head * torch.sigmoid(gates[0][h] @ y[i, 4 * h : 4 * h + 4] + gates[1][h])
            heads.append(head)
        rows.append(part.o_proj(torch.cat(heads)))
    return torch.stack(rows)


def walk(model: Any, ids: Tensor, gates: list[Any]) -> tuple[list[Any], list[Tensor], Tensor]:
    """Of one text: what each layer's attention is shown and gives, the stream after each layer, and logits."""
    x, parts, streams = model.model.embed_tokens(ids), [], []
    for layer, own in zip(model.model.layers, gates, strict=True):
        y = layer.input_layernorm(x)
        parts.append((y, attention(layer.self_attn, y, own)))
        x = x + parts[-1][1]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        streams.append(x)
    return parts, streams, model.lm_head(model.model.norm(x))


def texts() -> list[Tensor]:
    return [row[mask.bool()] for row, mask in zip(IDS, MASK, strict=True)]


def fresh_gates(model: Any) -> list[Any]:
    with attach(copy.deepcopy(model), TARGET) as run:
        state = run.state_dict()
    return [tuple(nn.Parameter(state[f"1.{i}.{name}"]) for name in ("weight", "bias")) for i in range(2)]


def test_the_first_step_of_layers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = llama(), Steps(monkeypatch, "Adam")
    told: list[Progress] = []
    how = AttentionEditing(TARGET, epochs=0, layer_rate=0.02)
    heedful.fit(how, model, [PADDED], progress=told.append).close()
    mine, gates, loss = copy.deepcopy(model), fresh_gates(model), torch.zeros(())
    count = int(MASK.sum()) * 16
    for ids in texts():
        with torch.no_grad():
            shown, _, _ = walk(model, ids, [None, None])
        for i, (y, wanted) in enumerate(shown):
            found = attention(mine.model.layers[i].self_attn, y, gates[i])
            for n in range(len(ids)):
                for e in range(16):
                    loss = loss + (found[n, e] - wanted[n, e]) ** 2 / count
    loss.backward()
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = [layer.self_attn for layer in mine.model.layers]
    expected = [p.grad for i in range(2) for p in (*gates[i], *(getattr(parts[i], name).weight for name in names))]
    assert len(steps.grads) == 1
    assert len(steps.grads[0]) == len(expected)
    for found, wanted in zip(steps.grads[0], expected, strict=True):
        assert found.shape == wanted.shape
        assert wanted.abs().max() > 1e-6
        assert close(found, wanted)
    assert steps.rates == [0.02]
    assert told[0] == Progress("layers", 0, 1)
    assert told[1] == Progress("layers", 1, 1, f"loss {loss.item():.4g}")
    assert told[2:] == [Progress("whole", 0, 0)]


@pytest.mark.parametrize("features", [0.0, 0.7])
def test_the_first_step_of_the_whole_by_hand(features: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = llama(), Steps(monkeypatch, "Adam")
    told: list[Progress] = []
    how = AttentionEditing(TARGET, layer_epochs=0, rate=0.003, features=features)
    heedful.fit(how, model, [PADDED], progress=told.append).close()
    mine, gates, loss = copy.deepcopy(model), fresh_gates(model), torch.zeros(())
    count = int(MASK.sum())
    for ids in texts():
        with torch.no_grad():
            _, wanted, logits = walk(model, ids, [None, None])
        _, streams, said = walk(mine, ids, gates)
        for n in range(len(ids)):
            p, q = logits[n].softmax(0), said[n].softmax(0)
            loss = loss + sum(p[w] * (p[w] / q[w]).log() for w in range(12)) / count
            for x, y in zip(streams, wanted, strict=True):
                cosine = (x[n] @ y[n]) / (x[n].norm() * y[n].norm())
                loss = loss + features * (1 - cosine) / (2 * count)
    loss.backward()
    flat: list[Tensor] = []
    for name, p in mine.named_parameters():
        if name.endswith("self_attn.q_proj.weight"):
            flat += [x.grad for x in gates[int(name.split(".")[2])]]
        flat.append(p.grad)
    assert len(steps.grads[0]) == len(flat)
    for found, expected in zip(steps.grads[0], flat, strict=True):
        assert close(found, expected)
    assert steps.rates == [0.003]
    assert told[-1] == Progress("whole", 1, 1, f"loss {loss.item():.4g}")


def test_the_model_stays_and_only_its_layers_are_taught() -> None:
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    how = AttentionEditing(TARGET.parts[0].on(layers=1), layer_epochs=2, epochs=0)
    with heedful.fit(how, model, [PADDED]) as run:
        after = run.model.state_dict()
        changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
        assert changed == {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"}
        assert all(p.requires_grad == (name != "model.norm.weight") for name, p in run.model.named_parameters())
        assert all(p.grad is None for p in run.model.parameters())
        assert run.model.training
        assert run.stack.parts == (SinkWindow(1, 2).on(layers=1),)
        assert run.installed()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_each_stage_brings_it_nearer() -> None:
    model = llama()

    def apart(layers: int, whole: int) -> float:
        how = AttentionEditing(TARGET, layer_epochs=layers, epochs=whole, layer_rate=0.003, rate=0.003)
        with heedful.fit(how, model, [PADDED]) as run, torch.no_grad():
            p, q = (m(**PADDED).logits[MASK.bool()].log_softmax(-1) for m in (model, run.model))
            return float((p.exp() * (p - q)).sum())

    swapped, layers, both = apart(0, 0), apart(20, 0), apart(20, 20)
    assert swapped > layers > both


def test_what_it_learned_is_saved_and_loaded(tmp_path: Path) -> None:
    with heedful.fit(AttentionEditing(TARGET), llama(), [PADDED]) as run, torch.no_grad():
        found = run(**PADDED).logits
        run.model.save_pretrained(tmp_path / "windowed")
    with heedful.load(tmp_path / "windowed") as again, torch.no_grad():
        assert again.stack == TARGET
        assert torch.equal(again(**PADDED).logits, found)


def test_fewer_key_heads_are_taught_too() -> None:
    model = models.tiny("mha")
    inputs = models.tiny_inputs(model)
    losses: list[str] = []
    how = AttentionEditing(surgery=MultiQueryAttention("mean"), layer_epochs=3, epochs=2)
    with heedful.fit(how, model, [inputs], progress=lambda p: losses.append(p.note)) as run, torch.no_grad():
        assert run(**inputs, use_cache=True).past_key_values.layers[0].keys.shape[1] == 1
        assert run.model.config.num_key_value_heads == 1
    assert float(losses[3].split()[1]) < float(losses[1].split()[1])
    assert float(losses[6].split()[1]) < float(losses[5].split()[1])


def test_a_linear_mechanism_is_taught_within_no_grad_and_generates() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), heedful.fit(AttentionEditing(LLNAttention().on(layers=1)), model, [inputs]) as run:
        words = {"input_ids": inputs["input_ids"], "max_new_tokens": 3, "do_sample": False}
        assert not torch.equal(run(**inputs).logits, model(**inputs).logits)
        assert run.generate(**words).shape[1] == inputs["input_ids"].shape[1] + 3


def test_images_and_both_halves_of_an_encoder_decoder_are_taught() -> None:
    model = models.tiny("vit")
    heedful.fit(AttentionEditing(GatedHeads()), model, [models.tiny_inputs(model)]).close()
    model = models.tiny("t5")
    inputs = models.tiny_inputs(model)
    with attach(model, TempScale(0.5)) as run:
        own = [i for i, name in enumerate(run.layer_names) if "EncDec" not in name]
    assert 0 < len(own) < len(run.layer_names)
    heedful.fit(AttentionEditing(GatedHeads().on(layers=own), features=0.1), model, [inputs]).close()
    with pytest.raises(FieldError, match=r"AttentionEditing\.target = .*looks at another stream"):
        heedful.fit(AttentionEditing(GatedHeads()), model, [inputs])
    heedful.fit(AttentionEditing(GatedHeads(), layer_epochs=0), model, [inputs]).close()


def test_a_model_without_logits_is_taught_in_layers_alone() -> None:
    model = llama().model
    with heedful.fit(AttentionEditing(TARGET, epochs=0), model, [PADDED]) as run:
        assert run.layer_names == ("layers.0.self_attn", "layers.1.self_attn")
    with pytest.raises(FieldError, match=r"AttentionEditing\.epochs = 1: must be 0, since LlamaModel gives no logits"):
        heedful.fit(AttentionEditing(TARGET), model, [PADDED])


def test_says_what_is_wrong(tmp_path: Path) -> None:
    for wrong in (
        {"layer_epochs": -1},
        {"epochs": -1},
        {"rate": 0.0},
        {"layer_rate": float("inf")},
        {"features": -1.0},
    ):
        with pytest.raises(FieldError, match=rf"AttentionEditing\.{next(iter(wrong))} = "):
            AttentionEditing(TARGET, **wrong)
    assert AttentionEditing(TARGET, layer_epochs=0, epochs=0, features=0.0).features == 0
    with pytest.raises(FieldError, match="edits HIDDEN"):
        AttentionEditing(GatedNorm())
    model = llama()
    with pytest.raises(FieldError, match="must be 1 or more"):
        heedful.fit(AttentionEditing(TARGET), model, [])
    with pytest.raises(FieldError, match="edits no layer"):
        heedful.fit(AttentionEditing(), model, [PADDED])
    with pytest.raises(FieldError, match="must be below 2"):
        heedful.fit(AttentionEditing(TempScale(0.5).on(layers=2)), model, [PADDED])
    with attach(model, TempScale(0.5)), pytest.raises(FieldError, match="close it first"):
        heedful.fit(AttentionEditing(TARGET), model, [PADDED])
    with pytest.raises(HeedfulError, match=r"torch\.bfloat16.*dtype=torch\.float32"):
        heedful.fit(AttentionEditing(TARGET), llama().bfloat16(), [PADDED])
    for more in ({"out": tmp_path}, {"progress": print}):
        with pytest.raises(FieldError, match="TempScale is fitted in one go"):
            heedful.fit(TempScale(0.5), model, [PADDED], **more)
    with pytest.raises(FieldError, match=r"layer_rate = .*: was too much: the loss is (nan|inf) after"):
        heedful.fit(AttentionEditing(TARGET, layer_epochs=9, layer_rate=1e30), model, [PADDED])
    assert not any(name.startswith("heedful_") for name, _ in model.named_parameters(recurse=True))
    attach(model, TempScale(0.5)).close()  # nothing was left behind
