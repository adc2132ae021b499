"""Whisper out of its packages: the CTranslate2 file, the model, and what it writes down of real speech."""

from __future__ import annotations

import struct
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from heedful import models
from heedful.core.errors import ModelError
from heedful.diagnosis.waves import read_wave
from heedful.models import packages, whisper
from heedful.models.ct2_weights import weights_of

TYPES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}


def clip(name: str) -> Path:
    """A sound that package moonshine-voice has."""
    try:
        found = files("moonshine-voice") or []
    except PackageNotFoundError:
        pytest.skip("moonshine-voice is installed on Linux for x86-64 alone")
    return next(Path(str(file.locate())) for file in found if file.name == name)


@pytest.fixture(scope="module")
def speech() -> models.Loaded:
    return models.speech()


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    held = [(package, file) for package, files in whisper.PACKED.parts.items() for file in files if "bin" in file]
    parts = [packages.installed(package, file) for package, file in held]
    return weights_of(b"".join(path.read_bytes() for path in parts if path is not None), "model.bin")


def test_every_weight_is_the_files_bit_for_bit(speech: models.Loaded, stored: dict[str, Tensor]) -> None:
    own = speech.model.state_dict()
    seen = set()

    def same(ours: str, theirs: Tensor) -> None:
        assert own[ours].shape == theirs.shape, ours
        assert torch.equal(own[ours], theirs.float()), ours
        seen.add(ours)

    for side in ("encoder", "decoder"):
        same(f"model.{side}.embed_positions.weight", stored[f"{side}/position_encodings/encodings"])
        same(f"model.{side}.layer_norm.weight", stored[f"{side}/layer_norm/gamma"])
        same(f"model.{side}.layer_norm.bias", stored[f"{side}/layer_norm/beta"])
        for i in range(6):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            norms = {"self_attn_layer_norm": "self_attention", "final_layer_norm": "ffn"}
            if side == "decoder":
                norms["encoder_attn_layer_norm"] = "attention"
            for norm, block in norms.items():
                same(f"{ours}.{norm}.weight", stored[f"{theirs}/{block}/layer_norm/gamma"])
                same(f"{ours}.{norm}.bias", stored[f"{theirs}/{block}/layer_norm/beta"])
            for kind in ("weight", "bias"):
                joined = stored[f"{theirs}/self_attention/linear_0/{kind}"]
                assert len(joined) == 3 * 512
                same(f"{ours}.self_attn.q_proj.{kind}", joined[:512])
                same(f"{ours}.self_attn.v_proj.{kind}", joined[1024:])
                if kind == "weight":
                    same(f"{ours}.self_attn.k_proj.{kind}", joined[512:1024])
                same(f"{ours}.self_attn.out_proj.{kind}", stored[f"{theirs}/self_attention/linear_1/{kind}"])
                for n in (1, 2):
                    same(f"{ours}.fc{n}.{kind}", stored[f"{theirs}/ffn/linear_{n - 1}/{kind}"])
                if side == "decoder":
                    joined = stored[f"{theirs}/attention/linear_1/{kind}"]
                    same(f"{ours}.encoder_attn.q_proj.{kind}", stored[f"{theirs}/attention/linear_0/{kind}"])
                    same(f"{ours}.encoder_attn.v_proj.{kind}", joined[512:])
                    if kind == "weight":
                        same(f"{ours}.encoder_attn.k_proj.{kind}", joined[:512])
                    same(f"{ours}.encoder_attn.out_proj.{kind}", stored[f"{theirs}/attention/linear_2/{kind}"])
    for n in (1, 2):
        for kind in ("weight", "bias"):
            same(f"model.encoder.conv{n}.{kind}", stored[f"encoder/conv{n}/{kind}"])
    same("model.decoder.embed_tokens.weight", stored["decoder/embeddings/weight"])
    same("proj_out.weight", stored["decoder/projection/weight"])
    assert seen == set(own)
    config = speech.model.config
    assert (config.encoder_attention_heads, config.decoder_attention_heads, config.num_mel_bins) == (8, 8, 80)
    assert models.load("whisper").name == models.load("speech").name == speech.name == "Whisper base"


def test_it_writes_down_what_is_said(speech: models.Loaded) -> None:
    samples, why = read_wave(clip("two_cities.wav"), 16_000)  # 44 seconds at 48,000 samples each
    assert (why, len(samples)) == ("", 2_129_958 // 3)
    heard = speech.tokenizer(audio=samples[: 12 * 16_000].numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        said = speech.model.generate(heard.input_features, max_new_tokens=60)
    (text,) = speech.tokenizer.batch_decode(said, skip_special_tokens=True)
    words = "It was the best of times, it was the worst of times. It was the age of wisdom,"
    assert text.strip().startswith(f"{words} it was the age of foolishness.")


def test_its_tokenizer_and_what_it_never_writes(speech: models.Loaded) -> None:
    told, words = speech.model.generation_config, speech.tokenizer.tokenizer
    assert words.decode(words("It's 3.14, été 你好 😀").input_ids, skip_special_tokens=True) == "It's 3.14, été 你好 😀"
    assert words.convert_ids_to_tokens([50257, 50258, 50359, 50363]) == [
        "<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>",
    ]  # fmt: skip
    assert words.encode(" Hello there, it was too", add_special_tokens=False) == [2425, 456, 11, 309, 390, 886]
    assert words.pad_token_id == words.eos_token_id == told.eos_token_id == 50257
    assert (len(told.lang_to_id), told.lang_to_id["<|en|>"], told.lang_to_id["<|su|>"]) == (99, 50259, 50357)
    assert told.decoder_start_token_id == 50258
    assert told.alignment_heads == [[3, 1], [4, 2], [4, 3], [4, 7], [5, 1], [5, 2], [5, 4], [5, 6]]
    assert (told.begin_suppress_tokens, len(told.suppress_tokens)) == ([220, 50257], 88)


def text(x: str) -> bytes:
    return struct.pack("<H", len(x) + 1) + x.encode() + b"\0"


def variable(name: str, x: Tensor) -> bytes:
    raw = x.contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.ndim else bytes([int(x), 0])
    kind = TYPES[x.dtype] if x.ndim else TYPES[torch.int16]
    shape = struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
    return text(name) + shape + struct.pack("<BI", kind, len(raw)) + raw


def small(seed: int = 0) -> WhisperForConditionalGeneration:
    torch.manual_seed(seed)
    sides = dict(encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=4)
    sizes = dict(encoder_ffn_dim=24, decoder_ffn_dim=40, max_source_positions=10, max_target_positions=12)
    config = WhisperConfig(vocab_size=50_400, num_mel_bins=8, d_model=16, **sides, **sizes)
    model = WhisperForConditionalGeneration(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def packed(model: WhisperForConditionalGeneration) -> dict[str, Tensor]:
    """The weights of a model as the converter names and joins them."""
    own, out = model.state_dict(), {}
    zero = torch.zeros(16)
    for side, heads in (("encoder", 2), ("decoder", 4)):
        out[f"{side}/num_heads"] = torch.tensor(heads)
    kinds = {"weight": "gamma", "bias": "beta"}
    for name, x in own.items():
        side, _, rest = name.removeprefix("model.").partition(".")
        place = rest.replace("layers.", "layer_").replace(".", "/")
        attention = "self_attention" if "self_attn" in place else "attention"
        layer, end = place.split("/")[0], place.rpartition("/")[2]
        if name == "proj_out.weight":
            continue  # an alias
        if "embed_tokens" in name:
            out["decoder/embeddings/weight"] = x
        elif "embed_positions" in name:
            out[f"{side}/position_encodings/encodings"] = x
        elif "conv" in name:
            out[f"{side}/{place}"] = x
        elif rest.startswith("layer_norm"):
            out[f"{side}/layer_norm/{kinds[end]}"] = x
        elif "layer_norm" in name:
            block = "ffn" if "final" in name else attention
            out[f"{side}/{layer}/{block}/layer_norm/{kinds[end]}"] = x
        elif "fc" in name:
            out[f"{side}/{layer}/ffn/linear_{int(place[-len(end) - 2]) - 1}/{end}"] = x
        elif "out_proj" in name:
            last = 1 if attention == "self_attention" else 2
            out[f"{side}/{layer}/{attention}/linear_{last}/{end}"] = x
        elif "q_proj" in name:
            q, k, v = (own.get(name.replace("q_proj", f"{p}_proj"), zero) for p in "qkv")
            joined = {"linear_0": [q, k, v]} if attention == "self_attention" else {"linear_0": [q], "linear_1": [k, v]}
            out |= {f"{side}/{layer}/{attention}/{part}/{end}": torch.cat(some) for part, some in joined.items()}
    return out


def written(variables: dict[str, Tensor], version: int = 6) -> bytes:
    head = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    alias = struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    return head + b"".join(variable(name, x) for name, x in variables.items()) + alias


def test_a_model_comes_back_out_of_a_file() -> None:
    model = small()
    found = whisper.model_of(weights_of(written(packed(model)), "x.bin"), "x.bin")
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], x) for name, x in model.state_dict().items())
    inputs = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.tensor([[3, 4, 5]])}
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, model(**inputs).logits)
    half = {name: x.half() if x.ndim else x for name, x in packed(model).items()}
    back = whisper.model_of(weights_of(written(half), "x.bin"), "x.bin")
    assert torch.equal(back.proj_out.weight, model.proj_out.weight.half().float())


def test_what_is_wrong_with_a_file_is_told() -> None:
    variables = packed(small())
    data = written(variables)
    for broken in (b"", b"nonsense", data[: len(data) // 2], data + b"x", written(variables, 5)):
        with pytest.raises(ModelError, match=r"x\.bin: is no CTranslate2 file of version 6"):
            weights_of(broken, "x.bin")
    whole = weights_of(data, "x.bin")  # with the alias that it cannot do without
    assert whisper.model_of(whole, "x.bin").config.encoder_layers == 2
    for wrong in (
        {name: x for name, x in whole.items() if name != "encoder/conv1/bias"},
        {name: x for name, x in whole.items() if name != "decoder/num_heads"},
        whole | {"decoder/layer_0/ffn/linear_0/weight_scale": torch.ones(3)},
        whole | {"encoder/layer_0/self_attention/linear_0/bias": torch.ones(48)},
        whole | {"encoder/conv1/weight": torch.ones(16, 8)},
    ):
        with pytest.raises(ModelError, match=r"x\.bin: its weights are not those of a Whisper"):
            whisper.model_of(wrong, "x.bin")
