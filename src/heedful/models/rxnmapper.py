"""RXNMapper's ALBERT, which learned chemical reactions as texts, as package rxnmapper has it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast

from heedful.core.kinds.loaded import Loaded
from heedful.models.packages import Packed, making

ATOM_MAP = (10, 5)  # the layer and the head whose weights the package reads as a map of atoms

# what the weights do not tell, since all layers share them
_TOLD = ("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "pad_token_id")
_GROUP = "albert.encoder.albert_layer_groups."
_MARKS = {f"{mark}_token": f"[{mark.upper()}]" for mark in ("cls", "sep", "pad", "unk", "mask")}
# atoms in brackets, atoms, an arrow, rings of two figures, and then bonds, branches and rings, one sign each
_SMILES = r"\[[^\]]+\]|Br|Cl|[BCNOSPFIbcnosp]|>>?|%[0-9]{2}|[0-9().=#\-+\\/:~@?*$]"


def reactions(**kw: Any) -> Loaded:
    """RXNMapper, a bidirectional encoder of reactions written as SMILES, in float32: from package rxnmapper.

    Layer 10 head 5 looks from an atom of the product at the atom of the reactants that it was; head 5 of layers below
    does so too, since all layers have the same weights. What is no SMILES is `[UNK]`.
    """
    return PACKED.load(**kw)


def model_of(weights: Mapping[str, Tensor], told: Mapping[str, Any], name: str) -> AlbertForMaskedLM:
    """The model with a copy of its layer for each time that it runs, so that these are told apart and edited alone.

    The pooler, which predicts no token, is left out.
    """
    with making("an ALBERT", name):
        own = {key: x for key, x in weights.items() if not key.startswith("albert.pooler.")}
        shared = {key: own.pop(key) for key in list(own) if key.startswith(_GROUP)}
        layers = range(told["num_hidden_layers"])
        own |= {key.replace(f"{_GROUP}0.", f"{_GROUP}{i}."): x for i in layers for key, x in shared.items()}
        table, inner = own["albert.embeddings.word_embeddings.weight"], own[f"{_GROUP}0.albert_layers.0.ffn.weight"]
        config = AlbertConfig(
            vocab_size=len(table),
            embedding_size=table.shape[1],
            hidden_size=inner.shape[1],
            intermediate_size=len(inner),
            max_position_embeddings=len(own["albert.embeddings.position_embeddings.weight"]),
            type_vocab_size=len(own["albert.embeddings.token_type_embeddings.weight"]),
            num_hidden_groups=len(layers),
            **{field: told[field] for field in _TOLD},
        )
        model = AlbertForMaskedLM(config)
        model.load_state_dict(own)
    return model.eval()


def tokenizer_of(vocabulary: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """What cuts SMILES into atoms, bonds, branches and rings."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(WordLevel(ids, unk_token=_MARKS["unk_token"]))
    backend.pre_tokenizer = Split(Regex(_SMILES), "isolated")
    ends = [(_MARKS[mark], ids[_MARKS[mark]]) for mark in ("cls_token", "sep_token")]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **_MARKS)


def unpack(paths: Sequence[Path], folder: Path) -> None:
    """Write the model and its tokenizer."""
    stored, told, words = paths
    weights = torch.load(stored, map_location="cpu", weights_only=True)
    model = model_of(weights, json.loads(told.read_text(encoding="utf-8")), stored.name)
    model.save_pretrained(folder)
    vocabulary = words.read_text(encoding="utf-8").splitlines()
    tokenizer_of(vocabulary, model.config.max_position_embeddings).save_pretrained(folder)


PACKED = Packed(
    name="RXNMapper",
    kind="masked language",
    version="0.4.3",
    parts={
        "rxnmapper": {
            "pytorch_model.bin": "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
            "config.json": "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
            "vocab.txt": "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
        }
    },
    unpack=unpack,
    takes="a second",
)
