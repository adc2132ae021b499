"""A model with what makes its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Loaded(NamedTuple):
    """A model in eval mode, its tokenizer (or processor; None where there is none), and which weights these are."""

    model: PreTrainedModel
    tokenizer: Any
    name: str


def model_of(given: nn.Module | Loaded) -> nn.Module:
    """The model itself, where it is given as `heedful.models` loads it."""
    return given.model if isinstance(given, Loaded) else given


@runtime_checkable
class Tokenizer(Protocol):
    """What makes token ids of a text, and texts of ids: a tokenizer of transformers, or a processor."""

    def __call__(self, text: Any, /, **how: Any) -> Any: ...

    def batch_decode(self, ids: Any, /) -> list[str]: ...


def words_of(reader: Any) -> Any:
    """The tokenizer itself, where a processor holds it."""
    return getattr(reader, "tokenizer", reader)
