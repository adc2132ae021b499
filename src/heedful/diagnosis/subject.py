"""A model that a diagnosis reads with: how it is fed, and what every run over it is attached with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.transformers import adapt
from heedful.api import attach
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.method import Part
from heedful.core.stack import Stack
from heedful.diagnosis.profile import endless
from heedful.diagnosis.texts import Delimiters
from heedful.engine.run import Run


@dataclass(frozen=True)
class Progress:
    """How far a diagnosis is."""

    stage: str  # "text", "trials", "weights" or "view"
    done: int  # tokens of this stage
    total: int
    note: str = ""


@dataclass(eq=False)
class Subject:
    """A model, how it is fed, and what every run over it is attached with."""

    model: Any  # a PreTrainedModel
    tokenizer: Any
    how: Mapping[str, Any]
    report: Callable[[Progress], None]

    def __post_init__(self) -> None:
        self.layers = len(adapt(self.model, self.how.get("only")).layer_names)
        takes = inspect.signature(self.model.forward).parameters
        if "input_ids" not in takes:
            raise RefusedModel(f"diagnose() reads text, and {type(self.model).__name__} takes no token ids")
        self.fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        if "logits_to_keep" in takes:
            self.fixed["logits_to_keep"] = 1  # nobody looks at the logits
        self.device = next(self.model.parameters()).device
        self.both = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self.vocabulary = int(self.model.get_input_embeddings().weight.shape[0])

    def attach(self, what: Part | Stack) -> Run:
        return attach(self.model, what, **self.how)

    def delimiters(self, batch: int) -> Delimiters | None:
        """Who says where delimiters stand, where words are known and texts are read one by one."""
        return Delimiters(self.tokenizer) if self.tokenizer is not None and batch == 1 else None

    def read(self, run: Run, rows: tuple[Tensor, ...]) -> None:
        """One forward over texts of any length, padded to the longest."""
        n = max(map(len, rows))
        ids = torch.stack([nn.functional.pad(row, (0, n - len(row))) for row in rows]).to(self.device)
        feed = {"input_ids": ids, **self.fixed}
        if any(len(row) < n for row in rows):
            lengths = torch.tensor([len(row) for row in rows], device=self.device)
            feed["attention_mask"] = (torch.arange(n, device=self.device) < lengths[:, None]).long()
        if self.both:  # both halves read the text
            feed["decoder_input_ids"] = ids
        with memory(n):
            run(**feed)
        if (layer := run.state.endless) is not None:
            raise endless(f"the heads of layer {layer} ({run.layer_names[layer]}) give")


@contextmanager
def memory(tokens: int) -> Iterator[None]:
    """Say what to do where the machine has too little memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises plain RuntimeErrors on a CPU
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "t allocate memory" in str(error)
        if not short and "not enough memory" not in str(error):
            raise
        rule = "the machine has too little memory to read that many tokens at once; pass fewer"
        raise FieldError("diagnose()", "length", tokens, rule, max(2, tokens // 2)) from error
