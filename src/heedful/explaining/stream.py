"""A text's residual stream, layer by layer, and the norm and the unembedding that make logits of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.weights import require_here
from heedful.adapters.wrapped import unwrapped
from heedful.api import attach, still
from heedful.core.call import Call
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.kinds.loaded import words_of
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.engine.precision import unmixed
from heedful.explaining.aim import fed, spelled
from heedful.models import Loaded

CLOSE = 1e-3  # of the largest logit: how far a reading may be from the model's own
ROUNDED = 4  # units in the last place that a product of matrices in half precision may be off by


class _Reading(Method):
    """What stands in the residual stream and what attention adds to it."""

    @reads(Site.EMBEDDING)
    def begins(self, x: Tensor, call: Call) -> Statistic:
        return Cat.of("x", x)

    @reads(Site.HEAD_OUTPUT)
    def heads(self, x: Tensor, call: Call) -> Statistic:
        return Cat.of("x", x)

    @reads(Site.OUTPUT)
    def adds(self, x: Tensor, call: Call) -> Statistic:
        return Cat.of("x", x)

    @reads(Site.RESIDUAL)
    def leaves(self, x: Tensor, call: Call) -> Statistic:
        return Cat.of("x", x)


def token_of(owner: str, field: str, given: int | str, words: Any, size: int) -> int:
    if not isinstance(given, str):
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < size:
            raise FieldError(owner, field, given, f"must be a token from 0 to {size - 1}, or its text", 42)
        return given
    if words is None:
        raise FieldError(owner, field, given, "is a text, and there is no tokenizer", 42)
    ids = words(given, add_special_tokens=False).input_ids
    if len(ids) != 1:
        parts = spelled(torch.tensor(ids), words)
        rule = f"must be one token, and is {len(ids)}: {parts}; mind the space before a word"
        raise FieldError(owner, field, given, rule, " Mary")
    return int(ids[0])


class Stream:
    """A text's stream, and the norm and the unembedding that make logits of it."""

    def __init__(self, owner: str, model: nn.Module | Loaded, text: Any, tokenizer: Any) -> None:
        given = model if isinstance(model, Loaded) else Loaded(unwrapped(model), None, "")
        self.model: Any = given.model
        self.words = words_of(tokenizer or given.tokenizer)
        inputs = fed(owner, self.model, text, self.words)
        if inputs.get("input_ids") is None or len(inputs["input_ids"]) != 1:
            raise FieldError(owner, "text", sorted(inputs), "must be one text, or its token ids", "Paris is the")
        self.ids = inputs["input_ids"][0]
        self.head: Any = self.model.get_output_embeddings()
        if not isinstance(self.head, nn.Linear) or self.model.config.is_encoder_decoder:
            raise RefusedModel(f"{type(self.model).__name__} is no language model of one stack of layers")
        if self.head.weight.is_meta:
            require_here(owner, self.model)
        with self._unmixed, still(self.model), attach(self.model, _Reading()) as run, _norms(self.model) as self.norms:
            self.logits = run(**inputs).logits[0]
            stats = run.state.statistics
        if (0, "begins", 0) not in stats:
            raise RefusedModel(f"{type(self.model).__name__} has layers of other kinds first; give its language model")
        layers = sorted(layer for _, name, layer in stats if name == "leaves")
        dtype = self.head.weight.dtype  # in which the model adds up, and which readers are not shown
        self.begins = stats[0, "begins", 0].value[0].to(dtype)
        self.heads, self.adds, self.leaves = (
            [stats[0, name, layer].value[0].to(dtype) for layer in layers] for name in ("heads", "adds", "leaves")
        )
        if any(x.shape != self.begins.shape for x in self.leaves):
            raise RefusedModel(f"{type(self.model).__name__} has layers of other kinds first; give its language model")
        last = self.norms[-1] if self.norms else None
        self.norm: Any = last[0] if last is not None and last[1].shape == self.leaves[-1].shape else None
        fits = self.head.in_features == self.begins.shape[-1]
        off = _off(self.says(self.leaves[-1][0]), self.logits) if fits else 1.0
        if off > CLOSE:
            raise RefusedModel(
                f"the logits of {type(self.model).__name__} are more than a norm and an unembedding of its last "
                f"layer's stream: reading them so is off by {off:.1%} of the largest"
            )

    @property
    def _unmixed(self) -> AbstractContextManager[object]:
        """Under autocast what heads add is rounded, and would be no sum."""
        return unmixed(self.head.weight)

    @property
    def tokens(self) -> list[str]:
        return spelled(self.ids, self.words)

    def mlps(self) -> list[Tensor]:
        """What each layer's MLP adds, `[1 n e]`; of models of which `require_sum` holds."""
        before = [self.begins, *self.leaves[:-1]]
        return [x - y - z for x, y, z in zip(self.leaves, before, self.adds, strict=True)]

    @property
    def cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def says(self, stream: Tensor) -> Tensor:
        """The logits of a stream `[n e]`."""
        with self._unmixed:
            logits: Tensor = self.head(stream if self.norm is None else self.norm(stream))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def require_sum(self) -> None:
        """Refuse a model whose stream is not the sum of what its heads and MLPs hand over."""
        name = type(self.model).__name__
        known = [self.begins, *self.leaves]
        known += [before + added for before, added in zip(known, self.adds, strict=False)]
        for norm, x, y in self.norms:
            if x.shape != self.begins.shape or torch.equal(y, self.begins):
                continue  # of queries or keys, or of what the stream begins with
            if all(_off(x, stream) > CLOSE for stream in known) or any(_off(y, out) == 0 for out in self.leaves):
                raise RefusedModel(
                    f"in {name} a {type(norm).__name__} or a factor stands between attention and the stream, so heads "
                    "have no direct effect of their own"
                )

    def require_heads(self) -> None:
        """Refuse a model whose heads pass more than an output projection on their way to the stream."""
        for heads, added, (o, bias) in zip(self.heads, self.adds, self.outputs, strict=True):
            made = torch.einsum("hnd,ehd->ne", heads[0].double(), o.double())
            made = made if bias is None else made + bias.double()
            if _off(made, added[0].double()) > max(CLOSE, ROUNDED * torch.finfo(added.dtype).eps):
                raise RefusedModel(
                    f"in {type(self.model).__name__} a gate or a norm stands between heads and their output "
                    "projection, so heads have no direct effect of their own"
                )

    def norm_at(self, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The final norm as the affine map that it is at one state: factors, shift, whether it takes the mean away."""
        if self.norm is None:
            return torch.ones_like(x).double(), torch.zeros_like(x).double(), False
        norm, x = deepcopy(self.norm).float(), x.float()  # half precision rounds more than the two kinds differ
        shift = norm(torch.zeros_like(x)).double()
        unit = torch.ones_like(x)  # of length 1 and mean 0
        unit[1::2] = -1
        weight = (norm(unit).double() - shift) * unit.double()
        want = norm(x).double() - shift
        tries = []
        for centred in (False, True):
            flat = weight * (x.double() - x.double().mean() * centred)
            factor = (want @ flat) / (flat @ flat)
            tries.append((_off(factor * flat, want), factor * weight, centred))
        off, factors, centred = min(tries, key=lambda found: found[0])
        if off > CLOSE:
            raise RefusedModel(f"the final norm, a {type(self.norm).__name__}, is neither by length nor by spread")
        return factors, shift, centred

    @cached_property
    def outputs(self) -> list[tuple[Tensor, Tensor | None]]:
        """Each layer's output projection `[e h d]`, and its bias."""
        from heedful.adapters.choosing import adapter_for
        from heedful.adapters.projections import projections
        from heedful.adapters.weights import read_weights

        names = adapter_for(self.model, None).layer_names
        found = (read_weights(projections(self.model, name, i)) for i, name in enumerate(names))
        return [(weights.o, weights.o_bias) for weights in found]


def _off(x: Tensor, y: Tensor) -> float:
    """The largest difference, over the largest number."""
    return float((x - y).abs().max()) / max(float(y.abs().max()), 1e-30)


@contextmanager
def _norms(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Every call of a norm, with what enters it and what leaves it, in order."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((module, args[0].detach(), output.detach()))

    named = [m for m in model.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    hooks = [module.register_forward_hook(note) for module in named]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
