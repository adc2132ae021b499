"""Piper's text encoder out of its package: the ONNX file, the model, and the tokenizer of phonemes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import VitsConfig

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import ModelError, RefusedModel
from heedful.methods import SinkRate
from heedful.models import piper
from heedful.models.onnx_weights import weights_of
from tests.test_vision import tensor, written

HELLO = "həlˈoʊ wˈɜːld"
# what onnxruntime 1.32 gives for HELLO out of the package's file: means of the latents, at every seventh token and 32nd
# number, and the weights of layer 5 between every seventh token
MEANS = (
    0.064760, -0.152868, -0.101517, 0.892163, -0.264935, 0.025919,
    -0.613425, -0.656880, 0.098424, -0.735861, -0.213436, 1.315910,
    -0.446039, -0.950988, -0.391790, -0.655331, -0.145451, 1.299743,
    -0.446754, -0.051113, -0.201465, 0.483113, -0.150109, 1.056429,
    0.020140, -0.281100, -0.110773, 0.804137, -0.258494, 0.159000,
)  # fmt: skip
WEIGHTS = (
    0.030245, 0.016718, 0.072363, 0.009293, 0.053621,
    0.014307, 0.021186, 0.016219, 0.006669, 0.007705,
    0.011534, 0.005118, 0.009077, 0.004886, 0.008317,
    0.012702, 0.055873, 0.014705, 0.007667, 0.010505,
    0.053073, 0.016577, 0.074901, 0.007515, 0.012683,
    0.039100, 0.039755, 0.020661, 0.031882, 0.043079,
    0.049775, 0.001644, 0.049986, 0.059454, 0.031255,
    0.094245, 0.034651, 0.008604, 0.044508, 0.041655,
    0.018807, 0.063565, 0.016581, 0.005370, 0.026078,
    0.037944, 0.042777, 0.018274, 0.034984, 0.017307,
)  # fmt: skip


@pytest.fixture(scope="module")
def voice() -> models.Loaded:
    return models.voice()


def test_it_computes_what_the_package_does(voice: models.Loaded) -> None:
    inputs = voice.tokenizer(HELLO, return_tensors="pt")
    with torch.no_grad():
        out = voice.model(**inputs, output_attentions=True)
    assert close(out.prior_means[0, ::7, ::32].flatten(), torch.tensor(MEANS))
    assert close(out.attentions[5][0, :, ::7, ::7].flatten(), torch.tensor(WEIGHTS))
    assert (voice.name, voice.model.training, len(out.attentions)) == ("Piper's voice joe", False, 6)
    assert models.load("piper").name == models.load("voice").name == voice.name


def test_padding_changes_nothing(voice: models.Loaded) -> None:
    both = voice.tokenizer([HELLO, "həlˈoʊ"], return_tensors="pt", padding=True)
    alone = voice.tokenizer("həlˈoʊ", return_tensors="pt")
    with torch.no_grad():
        padded, plain = voice.model(**both), voice.model(**alone)
    n = alone.input_ids.shape[1]
    assert close(padded.prior_means[1, :n], plain.prior_means[0])
    assert not padded.prior_means[1, n:].any()


def test_every_phoneme_has_a_blank_behind_it(voice: models.Loaded) -> None:
    ids = voice.tokenizer(HELLO).input_ids
    assert (ids[0], ids[-1], set(ids[1:-1:2])) == (1, 2, {0})
    assert ids[2:-1:2] == [voice.tokenizer.get_vocab()[sign] for sign in HELLO]
    assert voice.tokenizer.decode(ids, skip_special_tokens=True) == HELLO
    assert voice.tokenizer("").input_ids == [1, 0, 2]
    with pytest.raises(Exception, match="Missing"):  # of tokenizers' own, which has no class of it
        voice.tokenizer("Q")


def test_heedful_says_why_it_does_not_serve_it(voice: models.Loaded) -> None:
    """Its weights are multiplied with values and, band by band, with what relative places add to these."""
    with pytest.raises(RefusedModel, match="its weights go into pad too"), heedful.attach(voice.model, SinkRate()):
        pass


def small() -> piper.PiperTextEncoder:
    torch.manual_seed(0)
    sizes = dict(vocab_size=7, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, window_size=2)
    model = piper.PiperTextEncoder(VitsConfig(**sizes, ffn_dim=10, ffn_kernel_size=5, flow_size=4)).eval()
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.3)
    return model


def theirs(name: str) -> str:
    """A name as the exporter writes it."""
    if name.endswith("embed_tokens.weight"):
        return "sid"
    name = name.replace("text_encoder.project.", "enc_p.proj.").replace("text_encoder.", "enc_p.")
    name = re.sub(r"layers\.(\d)\.attention\.([qkv])_proj", r"attn_layers.\1.conv_\2", name)
    name = re.sub(r"layers\.(\d)\.attention\.out_proj", r"attn_layers.\1.conv_o", name)
    name = re.sub(r"layers\.(\d)\.attention", r"attn_layers.\1", name)
    name = re.sub(r"layers\.(\d)\.feed_forward", r"ffn_layers.\1", name)
    norm = re.match(r"(.*\.)layers\.(\d)\.(final_)?layer_norm\.(weight|bias)", name)
    if norm is None:
        return name
    end = {"weight": "gamma", "bias": "beta"}[norm[4]]
    return f"{norm[1]}norm_layers_{2 if norm[3] else 1}.{norm[2]}.{end}"


def exported(model: piper.PiperTextEncoder, path: Path) -> Path:
    own = {name: x[..., None] if name.endswith("_proj.weight") else x for name, x in model.state_dict().items()}
    graph = [tensor(theirs(name), x) for name, x in own.items()]
    graph += [tensor("/enc_p/Constant_output_0", torch.ones(1)), tensor("dec.conv_pre.weight", torch.ones(2, 2, 2))]
    path.write_bytes(written((1, 8), (7, written(*graph))))
    return path


def test_a_model_comes_back_out_of_an_onnx_file(tmp_path: Path) -> None:
    model = small()
    found = piper.model_of(weights_of(exported(model, tmp_path / "x.onnx")), "x.onnx")
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], x) for name, x in model.state_dict().items())
    ids = torch.tensor([[1, 0, 5, 0, 6, 0, 2]])
    with torch.no_grad():
        assert torch.equal(found(ids).prior_means, model(ids).prior_means)
    assert (found.config.num_attention_heads, found.config.window_size) == (3, 2)


def test_what_is_wrong_with_weights_is_told(tmp_path: Path) -> None:
    weights = weights_of(exported(small(), tmp_path / "x.onnx"))
    for lost in (
        "sid",
        "enc_p.proj.bias",
        "enc_p.encoder.attn_layers.0.emb_rel_k",
        "enc_p.encoder.norm_layers_2.1.beta",
    ):
        assert lost in weights
        with pytest.raises(ModelError, match=r"x\.onnx: its weights are not those of a VITS text encoder"):
            piper.model_of({name: x for name, x in weights.items() if name != lost}, "x.onnx")
