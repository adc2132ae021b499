"""Logit lens and direct effects on the logits, against the model's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, OPTConfig

from heedful import models
from heedful.core.errors import FieldError, RefusedModel
from heedful.explaining import DirectLogits, direct_logits, logit_lens
from tests.samples import uneven
from tests.test_diagnose_texts import characters

IDS = torch.arange(5, 17)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


def stream(model: Any, ids: Tensor = IDS) -> list[Tensor]:
    """The stream after each layer and what enters each output projection, by hooks on the model itself."""
    found: dict[str, list[Tensor]] = {"out": [], "heads": []}
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    hooks = []
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(lambda m, a, y: found["out"].append(y[0] if isinstance(y, tuple) else y))
        )
        o = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.attn.c_proj
        hooks.append(o.register_forward_pre_hook(lambda m, a: found["heads"].append(a[0])))
    with torch.no_grad():
        model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return [torch.stack([x.reshape(1, len(ids), -1)[0] for x in found[k]]).double() for k in ("out", "heads")]


def test_the_lens_is_norm_and_unembedding_of_each_layer() -> None:
    model = models.tiny("llama")
    found = logit_lens(model, IDS)
    out, _ = stream(model)
    norm = model.model.norm
    for layer in range(2):
        x = out[layer]
        by_hand = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
        torch.testing.assert_close(found.logits[layer], (by_hand @ model.lm_head.weight.double().T).float())
    said = found.logits[-1].argmax(-1)
    torch.testing.assert_close(found.said, said)
    for layer, position in ((0, 3), (1, 11)):
        row = found.logits[layer, position]
        chance = row.exp() / row.exp().sum()
        torch.testing.assert_close(found.probability[layer, position], chance[said[position]])
        assert int(found.rank[layer, position]) == sum(float(x) > float(row[said[position]]) for x in row)
        end = found.logits[-1, position].softmax(-1)
        torch.testing.assert_close(found.kl[layer, position], (end * (end.log() - chance.log())).sum())
    assert (found.rank[-1] == 0).all()
    assert found.words() == [f"{int(x)} " for x in found.logits[:, -1].argmax(-1)]
    assert "rank 1" in str(found)


def test_logits_that_a_model_widens_are_made_of_a_narrow_stream() -> None:
    model = models.tiny("llama", dtype=torch.bfloat16)
    plain = logit_lens(model, IDS)
    model.register_forward_hook(lambda m, args, out: type(out)(logits=out.logits.float()))
    assert torch.equal(logit_lens(model, IDS).logits, plain.logits)


def test_the_lens_is_drawn_with_its_words() -> None:
    pytest.importorskip("plotly")
    found = logit_lens(models.tiny("llama"), "a cat", tokenizer=characters())
    heat = found.plot().data[0]
    assert [row[4] for row in heat.text] == found.words(4)
    assert "".join(found.tokens) == "a cat"


@pytest.mark.parametrize("position", [-1, 4])
def test_a_heads_direct_effect_is_what_the_final_norm_makes_of_it(position: int) -> None:
    model = models.tiny("llama")
    found = direct_logits(model, IDS, 3, 4, position=position)
    out, heads = stream(model)
    end, norm = out[-1, position], model.model.norm
    scale = norm.weight.double() / (end.square().mean() + norm.variance_epsilon).sqrt()
    direction = (model.lm_head.weight[3] - model.lm_head.weight[4]).double()
    for layer in range(2):
        o = model.model.layers[layer].self_attn.o_proj.weight.double()
        width = o.shape[1] // 4
        for head in range(4):
            part = slice(head * width, (head + 1) * width)
            added = o[:, part] @ heads[layer, position, part]
            torch.testing.assert_close(found.heads[layer, head], (added * scale) @ direction)
    with torch.no_grad():
        logits = model(input_ids=IDS[None]).logits[0, position].double()
    assert found.total == pytest.approx(float(logits[3] - logits[4]), rel=1e-5)
    assert found.top(1)[0] == divmod(int(found.heads.abs().argmax()), 4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "mha"])
def test_the_parts_add_up_to_the_logit(kind: str) -> None:
    model = models.tiny(kind)
    for instead in (None, 9):
        found = direct_logits(model, IDS, instead=instead)
        parts = float(found.heads.sum() + found.mlps.sum() + found.biases.sum()) + found.embedding + found.rest
        assert parts == pytest.approx(found.total, rel=1e-4)
    assert found.figure.unit == "nats"
    assert set(found.curves.lines) == {"all heads", "MLP"}


def test_layernorm_with_a_bias_and_an_unembedding_with_one() -> None:
    model: Any = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.normal_()
        model.transformer.ln_f.weight.normal_()
        for block in model.transformer.h:
            block.attn.c_proj.bias.normal_()
        model.lm_head.bias = torch.nn.Parameter(torch.randn(64))
    found = direct_logits(model, IDS, 3)
    assert abs(found.rest) > abs(found.total) / 10
    assert float(found.biases.abs().min()) > abs(found.total) / 100
    for one in (found, direct_logits(model, IDS, 3, 9)):
        parts = float(one.heads.sum() + one.mlps.sum() + one.biases.sum()) + one.embedding + one.rest
        assert parts == pytest.approx(one.total, rel=1e-4)


def test_heads_that_a_layer_has_not_say_nothing() -> None:
    found = direct_logits(uneven(), IDS)
    assert found.heads.isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert len(found.top(10)) == 6
    heads = torch.tensor([[0.5, -0.75], [0.125, float("nan")]])
    told = DirectLogits(heads, torch.tensor([1.0, 2.0]), torch.zeros(2), 0.0, 0.0, 2.875)
    assert (told.figure.low, told.figure.high) == (-0.75, 0.75)
    assert told.curves.lines["all heads"].tolist() == [-0.25, 0.125]
    assert told.curves.lines["MLP"] is told.mlps


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=None), "stands between"),
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), "caps its logits"),
        (GraniteConfig(**SIZES, residual_multiplier=0.3), "stands between"),
        (GraniteConfig(**SIZES, logits_scaling=4.0), "more than a norm and an unembedding"),
        (OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                   word_embed_proj_dim=32, do_layer_norm_before=False), "stands between"),
        (OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                   word_embed_proj_dim=16), "more than a norm and an unembedding.* off by 100.0%"),
    ],
)  # fmt: skip
def test_what_is_no_such_sum_is_refused(config: Any, why: str) -> None:
    with pytest.raises(RefusedModel, match=why):
        direct_logits(AutoModelForCausalLM.from_config(config).eval(), IDS, 3)


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_models_without_such_logits_are_refused(kind: str) -> None:
    with pytest.raises(RefusedModel, match=r"more than a norm and an unembedding|no language model of one stack"):
        logit_lens(models.tiny(kind), IDS)


def test_a_model_with_a_tower_is_asked_for_its_language_model() -> None:
    model = models.tiny("llava")
    for read in (logit_lens, direct_logits):
        with pytest.raises(RefusedModel, match="give its language model"):
            read(model, models.tiny_inputs(model, batch=1))
    with pytest.raises(FieldError, match=r"text = \['pixel_values'\]"):
        logit_lens(models.tiny("vit"), models.tiny_inputs(models.tiny("vit"), batch=1))


def test_answers_are_single_tokens() -> None:
    model, words = models.tiny("llama"), characters()
    found = direct_logits(model, "a cat", "c", "t", tokenizer=words)
    same = direct_logits(model, "a cat", *(int(words(x).input_ids[0]) for x in "ct"), tokenizer=words)
    assert found.total == same.total
    with pytest.raises(FieldError, match="must be one token, and is 3"):
        direct_logits(model, "a cat", "cat", tokenizer=words)
    with pytest.raises(FieldError, match="there is no tokenizer"):
        direct_logits(model, IDS, "c")
    with pytest.raises(FieldError, match="must be one text"):
        logit_lens(model, torch.ones(2, 4, dtype=torch.long))
    for wrong in (-1, 128, True):
        with pytest.raises(FieldError, match=r"answer = .*must be (a token from 0 to 127|int, str or None)"):
            direct_logits(model, IDS, wrong)
    for place in (IDS.shape[-1], -IDS.shape[-1] - 1):
        with pytest.raises(FieldError, match=r"position = .*must be one of the"):
            direct_logits(model, IDS, 5, position=place)


def test_half_precision_has_direct_effects_too() -> None:
    model = models.tiny("llama", dtype=torch.bfloat16)
    found = direct_logits(model, IDS, 5, 7)
    exact = direct_logits(model.float(), IDS, 5, 7)
    assert found.top(1) == exact.top(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rests_while_the_stream_is_read(dtype: torch.dtype) -> None:
    model, ids = models.tiny("gpt2").eval(), torch.arange(3, 15)[None]
    plain, lens = direct_logits(model, ids), logit_lens(model, ids)
    with torch.autocast("cpu", dtype=dtype):
        mixed, seen = direct_logits(model, ids), logit_lens(model, ids)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(mixed.heads, plain.heads)
    assert mixed.total == plain.total
    assert torch.equal(seen.logits, lens.logits)


def test_they_show_themselves_in_words() -> None:
    model = models.tiny("llama")
    assert repr(direct_logits(model, IDS)) == str(direct_logits(model, IDS))
    assert repr(logit_lens(model, IDS)) == str(logit_lens(model, IDS))
