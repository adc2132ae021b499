"""What is explained: one number that a model says of a text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.adapters.wrapped import device_of, unwrapped
from heedful.core.errors import Code, FieldError, RefusedModel
from heedful.core.figures import Head
from heedful.core.kinds.loaded import words_of
from heedful.core.kinds.tokens import Prompt
from heedful.shown import Reads

BROKEN = "\ufffd"  # stands for what is no whole character
SHARED = 12  # tokens that share characters, at most
Text = Prompt | Tensor | Sequence[int]


def ids_of(prompt: Text, model: nn.Module) -> Tensor:
    """The token ids of one text without padding, `[1 n]`."""
    unwrapped(model)  # or the reason why there is none
    tokens = prompt.tokens if isinstance(prompt, Prompt) else prompt
    ids = _as_ids(tokens, device_of(model))
    if ids is None or len(ids) != 1 or ids.shape[1] < 2:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else tokens
        raise FieldError("explain", "prompt", got, "must be one text of 2 tokens or more, as their ids", (1, 2, 3))
    _require_known("explain", model, ids)
    return ids


def _require_known(owner: str, model: Any, ids: Tensor) -> None:
    """Refuse tokens that the model has no embedding of."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # of several towers
        table = None
    if table is None:  # it reads something else
        return
    known, low, high = len(table), int(ids.min()), int(ids.max())
    if low < 0 or high >= known:
        rule = f"holds the token {low if low < 0 else high}, and the model knows those from 0 to {known - 1}"
        raise FieldError(owner, "text", ids, rule, [1, 2, 3])


def _as_ids(tokens: Any, device: torch.device) -> Tensor | None:
    """Token ids as `[b n]`, if that is what these are."""
    try:
        ids = torch.as_tensor(tokens, device=device)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not ids.is_floating_point() and ids.dtype is not torch.bool and ids.ndim in (1, 2)
    return (ids[None] if ids.ndim == 1 else ids) if whole else None


def fed(owner: str, model: Any, text: Any, tokenizer: Any, field: str = "text") -> dict[str, Any]:
    """What the model is called with: for a string, token ids, or what it is called with already.

    Of a model that is none of transformers nothing else is known: a mapping, or its first argument.
    """
    device = device_of(model)
    if not isinstance(model, PreTrainedModel):
        first = next(iter(inspect.signature(model.forward).parameters), "x")
        given = suiting(owner, field, model, {first: text} if isinstance(text, Tensor) else text)
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    if isinstance(text, str):
        if read_by(model) == "image":
            rule = "a model that reads images takes the pixels of one, [c rows cols]"
            raise FieldError(owner, field, text, rule, Code("processor(image, return_tensors='pt').pixel_values"))
        if tokenizer is None:
            raise FieldError(
                owner, "tokenizer", None, "is needed for a text", Code("AutoTokenizer.from_pretrained(name)")
            )
        text = words_of(tokenizer)(text, return_tensors="pt")
    rule, good = "must be one text: a string, token ids, or what the model is called with", "Paris is the"
    if isinstance(text, Mapping):
        found = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in text.items()}
        if not any(isinstance(x, Tensor) for x in found.values()):
            raise FieldError(owner, field, text, rule, good)
    elif read_by(model) == "image" and isinstance(text, Tensor) and text.is_floating_point() and text.ndim in (3, 4):
        found = {model.main_input_name: (text if text.ndim == 4 else text[None]).to(device)}
    else:
        ids = _as_ids(text, device)
        if ids is None:
            raise FieldError(owner, field, text, rule, good)
        found = {"input_ids": ids}
    if "input_ids" in found:
        if not found["input_ids"].numel():
            raise FieldError(owner, field, [], rule + ", and holds no token", good)
        _require_known(owner, model, found["input_ids"])
    if model.config.is_encoder_decoder and "input_ids" in found:
        found.setdefault("decoder_input_ids", found["input_ids"])
    return found


def suiting(owner: str, field: str, model: nn.Module, inputs: Any) -> Mapping[str, Any]:
    """Inputs that the model can be called with, by name."""
    takes = inspect.signature(model.forward)
    try:
        takes.bind(**inputs)
    except TypeError as error:
        rule = f"must hold what {type(model).__name__} is called with, by name: {', '.join(takes.parameters)}"
        good = {next(iter(takes.parameters), "x"): "..."}
        told = list(inputs) if isinstance(inputs, Mapping) else inputs
        raise FieldError(owner, field, told, rule, [good] if field == "batches" else good) from error
    return dict(inputs)


def fed_each(owner: str, model: Any, texts: Any, tokenizer: Any, field: str = "text") -> dict[str, Any]:
    """The same for one text, or for a list of texts or of images, which a model of transformers reads as a batch."""
    several = isinstance(texts, Sequence) and not isinstance(texts, str) and isinstance(model, PreTrainedModel)
    if not several or not texts or not all(isinstance(x, Sequence | Tensor) and not _number(x) for x in texts):
        return fed(owner, model, texts, tokenizer, field)
    each = [fed(owner, model, text, tokenizer, field) for text in texts]
    if not (rows := [row for found in each for row in found.get("input_ids", ())]):
        name = next(iter(each[0]))
        if len({found[name].shape[1:] for found in each}) > 1:
            shapes = [tuple(found[name].shape[1:]) for found in each]
            raise FieldError(owner, field, shapes, "several images are of one size", [(3, 224, 224)] * 2)
        return {name: torch.cat([found[name] for found in each])}
    return batch_of(model, rows)


def _number(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 0


def batch_of(model: Any, rows: Sequence[Tensor]) -> dict[str, Any]:
    """What a model is called with to read texts at once, `[n]` ids each, padded on the right to the longest."""
    n, device = max(map(len, rows)), device_of(model)
    ids = torch.stack([nn.functional.pad(row, (0, n - len(row))) for row in rows]).to(device)
    feed: dict[str, Any] = {"input_ids": ids}
    if any(len(row) < n for row in rows):
        lengths = torch.tensor([len(row) for row in rows], device=device)
        feed["attention_mask"] = (torch.arange(n, device=device) < lengths[:, None]).long()
    if getattr(model.config, "is_encoder_decoder", False):  # both halves read the text
        feed["decoder_input_ids"] = ids
        if "attention_mask" in feed:
            feed["decoder_attention_mask"] = feed["attention_mask"]
    return feed


def read_by(model: Any) -> Reads:
    """What the model is called with: an image and no text, a sound of which it writes down the words, or else text."""
    takes, main = inspect.signature(model.forward).parameters, getattr(model, "main_input_name", "")
    if main == "pixel_values" and "input_ids" not in takes:
        return "image"
    return "sound" if main == "input_features" and "decoder_input_ids" in takes else "text"


def require_count(owner: str, count: int) -> None:
    """Refuse to name the best of nothing."""
    if count < 1:
        raise FieldError(owner, "count", count, "must be 1 head or more", 10)


def pairs(owner: str, heads: Any, field: str = "heads") -> dict[int, list[int]]:
    """Heads given as (layer, head), whatever holds them: by layer, each once."""
    rule, good = "must be pairs of layer and head, counted from 0", [(3, 1)]
    found: dict[int, set[int]] = {}
    try:
        for layer, head in heads:
            found.setdefault(index(layer), set()).add(index(head))
    except (TypeError, ValueError) as error:
        raise FieldError(owner, field, heads, rule, good) from error
    if any(layer < 0 or min(mine) < 0 for layer, mine in found.items()):
        raise FieldError(owner, field, heads, rule, good)
    return {layer: sorted(mine) for layer, mine in sorted(found.items())}


def strongest(values: Tensor, count: int) -> tuple[Head, ...]:
    """The places of the largest of `values [rows columns]`, whatever their sign, largest first; none that is nan."""
    sizes = {divmod(i, values.shape[1]): x for i, x in enumerate(values.abs().flatten().tolist()) if not isnan(x)}
    return tuple(sorted(sizes, key=lambda place: -sizes[place])[:count])


def spelled(ids: Tensor, tokenizer: Any) -> list[str]:
    """Tokens as text, one by one; their ids where nobody can spell them."""
    return [f"{i} " for i in ids.tolist()] if tokenizer is None else list(tokenizer.batch_decode(ids[:, None]))


def spelled_in_order(ids: Tensor, tokenizer: Any) -> list[str]:
    """The tokens of a text: of a character that several share the first has it all, and the others nothing."""
    parts = spelled(ids, tokenizer)
    for start, part in enumerate(parts):
        for stop in range(start + 2, start + 1 + SHARED) if BROKEN in part else ():
            if BROKEN not in (whole := tokenizer.decode(ids[start:stop])):
                parts[start:stop] = [whole, *[""] * (len(ids[start:stop]) - 1)]
                break
    return parts


@contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Gradients reach back to the embeddings, for the length of a `with`."""

    def ask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    hook = model.get_input_embeddings().register_forward_hook(ask)  # type: ignore[operator]
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()


@dataclass(frozen=True, eq=False)
class Aim:
    """A token's or a class's logit, or, in a model without logits, the mean of its last states."""

    kind: Literal["token", "class", "states"]
    target: int | None  # the token or class; None where the states are meant
    position: int | None  # where it is read; None where all positions are
    whole: Tensor | None = None  # [e]: the mean state of the whole text, length 1

    @property
    def unit(self) -> str:
        return "cosine" if self.kind == "states" else "nats"

    def raw(self, output: Any) -> Tensor:
        """The logit, or the length along the text's own mean state, of each text `[b]`: what gradients are taken of."""
        if self.whole is not None:
            states: Tensor = output.last_hidden_state
            return states.mean(1) @ self.whole
        return self.logits(output)[:, self.target]

    def score(self, output: Any, kept: Tensor) -> Tensor:
        """The log-probability, or the cosine with the whole text's mean state, of each text `[b]`.

        Tokens that are not `kept [b n]` have no part in the mean; a text of which none is has a cosine of 0.
        """
        if self.whole is not None:
            along = (output.last_hidden_state * kept[..., None]).mean(1)  # as the mean of those that are kept
            return nn.functional.normalize(along, dim=-1) @ self.whole
        return self.logits(output).log_softmax(-1)[:, self.target]

    def logits(self, output: Any) -> Tensor:
        """Of each text, those of all tokens or classes where the answer is read, `[b answers]`."""
        logits: Tensor = output.logits
        return logits[:, self.position] if self.kind == "token" else logits

    def row(self, relevance: Tensor) -> Tensor:
        """Of `[n n]`, what every position draws from every token, the share that matters here `[n]`."""
        return relevance.mean(0) if self.position is None else relevance[self.position]


def _causal(model: nn.Module) -> bool:
    """Whether tokens see none that follow, so that the last alone has seen the whole text."""
    from heedful.adapters.choosing import adapter_for

    adapter = adapter_for(model, None)
    modules = [adapter.model.get_submodule(name) for name in adapter.layer_names]
    return any(getattr(module, "is_causal", False) or getattr(module, "is_decoder", False) for module in modules)


@torch.no_grad()
def aim_of(model: nn.Module, ids: Tensor, target: int | None, position: int | None) -> Aim:
    """What to explain of this text: the target given, or the likeliest one.

    Unless a position is given, a prediction is read at the last token, and so is a class where attention is causal;
    else a class is read at the first.
    """
    n = ids.shape[1]
    if position is not None and not -n <= position < n:
        raise FieldError("explain", "position", position, f"must be one of the {n} tokens, from the front or back", -1)
    output = model(input_ids=ids)
    logits = getattr(output, "logits", None)
    if logits is None:
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise RefusedModel(f"{type(model).__name__} gives neither logits nor last hidden states of a text")
        if target is not None:
            raise FieldError("explain", "target", target, "the model has no logits: its mean state is meant", None)
        return Aim("states", None, position, nn.functional.normalize(states[0].mean(0), dim=-1))
    if logits.ndim == 3:
        place = (n - 1 if position is None else position) % n
        scores, kind = logits[0, place], "token"
    else:
        place = (-_causal(model) if position is None else position) % n
        scores, kind = logits[0], "class"
    if target is not None and not 0 <= target < len(scores):
        raise FieldError("explain", "target", target, f"must be a {kind} from 0 to {len(scores) - 1}", 0)
    chosen = int(scores.argmax()) if target is None else target
    return Aim("token" if kind == "token" else "class", chosen, place)
