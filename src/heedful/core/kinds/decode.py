"""What combines or changes the next token's logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from heedful.core.entry import CatalogueEntry
from heedful.core.kinds.tokens import Prompt, Reader
from heedful.core.method import Part, Stack

NOTHING: Mapping[str, Any] = MappingProxyType({})
Read = Mapping[str, Mapping[Part, Any]]  # of each variant, what its reading methods have to tell of the last forward
NOTHING_READ: Read = MappingProxyType({})


class Decode(CatalogueEntry, abstract=True):
    """Combines or changes next-token logits, of which it may read what made them."""

    kind = "decode"
    handed_to = "heedful.decode()"
    # whether it combines what a diffusion model predicts too; the `role` of one that has such names places of a picture
    denoises: ClassVar[bool] = False

    def ready(self, prompt: Prompt, read: Reader) -> Decode:
        """The step that knows the prompt, where variants depend on what the model reads of it; the same otherwise."""
        return self

    @abstractmethod
    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        """The runs whose logits are combined, by name; the first one is the prompt that is continued."""

    @abstractmethod
    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        """The logits `[vocabulary]` to decode from, given those of each variant and what its readers read of them."""
