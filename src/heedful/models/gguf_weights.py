"""A model out of a GGUF file, by way of a copy that is plain float32."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits

from heedful.core.errors import ModelError, first_line
from heedful.core.kinds.loaded import Loaded
from heedful.models.copies import unpacked
from heedful.models.folders import pretrained, require_whole


def from_gguf(path: Path, **kw: Any) -> Loaded:
    """Load the float32 copy of a GGUF file, made at first use: unpacking takes half a minute, the copy a second."""
    return pretrained(unpacked([path], convert, "half a minute"), path.stem, **kw)


def convert(paths: Sequence[Path], folder: Path) -> None:
    """Write the float32 model of a GGUF file, and its tokenizer."""
    (path,) = paths
    try:
        packed, found = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (ValueError, LookupError, struct.error, ImportError, NotImplementedError) as error:
        raise ModelError(f"{path.name}: transformers cannot read this GGUF file: {first_line(error)}") from error
    require_whole(path.name, sorted(found["missing_keys"]))
    fields = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    # transformers refuses to save a model that it read from GGUF; an equal one made from the config it does save.
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(
            type(packed.config).from_dict(fields), dtype=torch.float32
        )
    try:
        model.load_state_dict(packed.state_dict())
    except RuntimeError as error:
        raise ModelError(f"{path.name}: its weights did not unpack into a plain model: {first_line(error)}") from error
    model.generation_config = packed.generation_config
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Give back the one-digit-a-token rule, which transformers drops when it reads a byte-level BPE from GGUF.

    Without it "a  3" becomes other tokens than in training. No token of two digits in the vocabulary means that rule.
    """
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, ByteLevel) and not any(
        len(token) > 1 and token.isascii() and token.isdigit() for token in backend.get_vocab(with_added_tokens=False)
    ):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
