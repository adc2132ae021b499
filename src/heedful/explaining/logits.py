"""What the residual stream would say at each layer, and what each head and MLP says directly to the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.wrapped import unwrapped
from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.figures import Curves, Grid, Head, HeadMap, head_name
from heedful.core.kinds import Tokenizer
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.explaining.aim import fed, require_count, spelled
from heedful.models import Loaded

CLOSE = 1e-3  # of the largest logit: how far a reading may be from the model's own


class _Stream(Method):
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


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """What the stream would say after each layer, were it the last: the model's own norm and unembedding of it."""

    tokens: list[str]
    logits: Tensor  # [layers n v]
    vocabulary: Any = None  # the tokenizer that knows the words

    @cached_property
    def said(self) -> Tensor:
        """The token that each position says in the end, `[n]`."""
        return self.logits[-1].argmax(-1)

    @cached_property
    def probability(self) -> Tensor:
        """That token's probability after each layer, `[layers n]`."""
        at = self.said[None, :, None].expand(len(self.logits), -1, -1)
        return self.logits.softmax(-1).gather(-1, at)[..., 0]

    @cached_property
    def rank(self) -> Tensor:
        """How many tokens are likelier after each layer, `[layers n]`."""
        at = self.said[None, :, None].expand(len(self.logits), -1, -1)
        return (self.logits > self.logits.gather(-1, at)).sum(-1)

    @cached_property
    def kl(self) -> Tensor:
        """How far what a layer says lies from what the model says, in nats, `[layers n]`."""
        end = self.logits[-1].log_softmax(-1)
        return (end.exp() * (end - self.logits.log_softmax(-1))).sum(-1)

    @asks
    def words(self, position: int = -1) -> list[str]:
        """The likeliest token after each layer."""
        n = self.logits.shape[1]
        if not -n <= position < n:
            raise FieldError("Lens.words()", "position", position, f"must be from {-n} to {n - 1}", -1)
        return spelled(self.logits[:, position].argmax(-1), self.vocabulary)

    @property
    def figure(self) -> Grid:
        best = self.logits.argmax(-1)
        what = "The likeliest next token after each layer, and the probability there of what the model says in the end."
        rows, columns = [str(i) for i in range(len(best))], [f"{i} {x}" for i, x in enumerate(self.tokens)]
        text = [spelled(row, self.vocabulary) for row in best]
        return Grid("lens", "Logit lens", what, self.probability, rows, columns, "layer", "token", "share", text=text)

    def plot(self) -> Any:
        """The words of all layers and tokens as a plotly figure."""
        from heedful.report.plots import draw

        return draw(self.figure)

    def __repr__(self) -> str:
        rows = [f"the last of {len(self.tokens)} tokens, and what it says after each layer:"]
        for layer, word in enumerate(self.words()):
            chance, rank = float(self.probability[layer, -1]), int(self.rank[layer, -1])
            rows.append(f"  {layer:>3} {word!r:<16} the answer: {chance:.1%}, rank {rank + 1}")
        return "\n".join(rows)


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogits:
    """A logit, or the difference of two, as a sum: what each part adds to the stream, as the final norm scales it."""

    heads: Tensor  # [layers h]
    mlps: Tensor  # [layers]
    biases: Tensor  # [layers], of the attention's output projection
    embedding: float
    rest: float  # the biases of the final norm and of the unembedding
    total: float  # what the model says; all of the above add up to it

    @asks
    def top(self, count: int) -> tuple[Head, ...]:
        """The heads that say most, whatever their sign."""
        require_count("DirectLogits.top()", count)
        best = self.heads.abs().nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)[:count].tolist()
        return tuple((i // self.heads.shape[1], i % self.heads.shape[1]) for i in best)

    @property
    def figure(self) -> HeadMap:
        size = float(self.heads.abs().nan_to_num(0.0).max())
        what = "What each head says directly to the logits, in nats; below 0 it speaks against the answer."
        layers = range(len(self.heads))
        return HeadMap("direct", "Direct effect on the logits", what, layers, self.heads, "nats", -size, size)

    @property
    def curves(self) -> Curves:
        lines = {"all heads": self.heads.nan_to_num(0.0).sum(-1), "MLP": self.mlps}
        what = "What the heads and the MLP of each layer say directly to the logits."
        x = range(len(self.mlps))
        return Curves("direct_layers", "Direct effect by layer", what, x, lines, "layer", "nats")

    def plot(self) -> Any:
        """The heads as a plotly figure."""
        from heedful.report.plots import draw

        return draw(self.figure)

    def __repr__(self) -> str:
        heads = float(self.heads.nan_to_num(0.0).sum())
        rows = [
            f"{self.total:+.2f} nats: heads {heads:+.2f}, MLPs {float(self.mlps.sum()):+.2f}, embedding "
            f"{self.embedding:+.2f}, biases {float(self.biases.sum()) + self.rest:+.2f}; the heads that say most:"
        ]
        rows += [f"  {head_name(*head):>6} {float(self.heads[head]):+.2f}" for head in self.top(10)]
        return "\n".join(rows)


@torch.no_grad()
@asks
def logit_lens(model: nn.Module | Loaded, text: Any, *, tokenizer: Tokenizer | None = None) -> Lens:
    """What each layer's stream says of the next token, `Lens`; printed or drawn with `plot()` it shows the words.

    Refused where the logits are not made of the last layer's stream by a norm and an unembedding.
    """
    found = _Found("logit_lens()", model, text, tokenizer)
    logits = torch.stack([found.says(x[0]) for x in found.leaves])
    return Lens(spelled(found.ids, found.words), logits, found.words)


@torch.no_grad()
@asks
def direct_logits(
    model: nn.Module | Loaded,
    text: Any,
    answer: int | str | None = None,
    instead: int | str | None = None,
    *,
    position: int = -1,
    tokenizer: Tokenizer | None = None,
) -> DirectLogits:
    """Direct logit attribution: what each head and MLP adds to the logit of `answer`, less that of `instead`.

    `answer` is a token: its id, or a text that is one token; by default the likeliest. The final norm is held at the
    scale that it has on this text, so that the parts add up to the logit.
    """
    found = _Found("direct_logits()", model, text, tokenizer)
    n, size = found.logits.shape
    if not -n <= position < n:
        rule = f"must be one of the {n} tokens, from the front or back"
        raise FieldError("direct_logits()", "position", position, rule, -1)
    logits = found.logits[position]
    found.require_sum()
    right = int(logits.argmax()) if answer is None else _token("answer", answer, found.words, size)
    vectors = [(right, 1.0)] + ([] if instead is None else [(_token("instead", instead, found.words, size), -1.0)])
    direction = sum(sign * found.head.weight[i].double() for i, sign in vectors)
    bias = getattr(found.head, "bias", None)
    rest = 0.0 if bias is None else sum(sign * float(bias[i]) for i, sign in vectors)
    scale, shift, centred = found.norm_at(found.leaves[-1][0, position])
    seen = direction * scale
    seen = seen - seen.mean() if centred else seen

    def told(x: Tensor) -> Tensor:
        return x.double() @ seen

    layers = range(len(found.leaves))
    heads = torch.full((len(layers), max(x.shape[1] for x in found.heads)), float("nan"), dtype=torch.float64)
    mlps, biases = torch.zeros(2, len(layers), dtype=torch.float64)
    begin = found.begins[0, position]
    before = begin
    for layer in layers:
        each = torch.einsum("hd,ehd->he", found.heads[layer][0, :, position].double(), found.outputs[layer].double())
        heads[layer, : len(each)] = told(each)
        added, after = found.adds[layer][0, position], found.leaves[layer][0, position]
        biases[layer] = told(added.double() - each.sum(0))
        mlps[layer] = told(after.double() - before.double() - added.double())
        before = after
    total = float(sum(sign * float(logits[i]) for i, sign in vectors))
    return DirectLogits(heads, mlps, biases, float(told(begin)), rest + float(shift.double() @ direction), total)


def _token(field: str, given: int | str, words: Any, size: int) -> int:
    if not isinstance(given, str):
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < size:
            raise FieldError("direct_logits()", field, given, f"must be a token from 0 to {size - 1}, or its text", 42)
        return given
    if words is None:
        raise FieldError("direct_logits()", field, given, "is a text, and there is no tokenizer", 42)
    ids = words(given, add_special_tokens=False).input_ids
    if len(ids) != 1:
        parts = spelled(torch.tensor(ids), words)
        rule = f"must be one token, and is {len(ids)}: {parts}; mind the space before a word"
        raise FieldError("direct_logits()", field, given, rule, " Mary")
    return int(ids[0])


class _Found:
    """A text's stream, and the norm and the unembedding that make logits of it."""

    def __init__(self, owner: str, model: nn.Module | Loaded, text: Any, tokenizer: Any) -> None:
        given = model if isinstance(model, Loaded) else Loaded(unwrapped(model), None, "")
        self.model: Any = given.model
        self.words = getattr(tokenizer or given.tokenizer, "tokenizer", tokenizer or given.tokenizer)
        inputs = fed(owner, self.model, text, self.words)
        if inputs.get("input_ids") is None or len(inputs["input_ids"]) != 1:
            raise FieldError(owner, "text", sorted(inputs), "must be one text, or its token ids", "Paris is the")
        self.ids = inputs["input_ids"][0]
        self.head: Any = self.model.get_output_embeddings()
        if not isinstance(self.head, nn.Linear) or self.model.config.is_encoder_decoder:
            raise RefusedModel(f"{type(self.model).__name__} is no language model of one stack of layers")
        with still(self.model), attach(self.model, _Stream()) as run, _norms(self.model) as self.norms:
            self.logits = run(**inputs).logits[0]
            stats = run.state.statistics
        if (0, "begins", 0) not in stats:
            raise RefusedModel(f"{type(self.model).__name__} has layers of other kinds first; give its language model")
        layers = sorted(layer for _, name, layer in stats if name == "leaves")
        self.begins, *_ = stats[0, "begins", 0].value
        self.heads, self.adds, self.leaves = (
            [stats[0, name, layer].value[0] for layer in layers] for name in ("heads", "adds", "leaves")
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
    def cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def says(self, stream: Tensor) -> Tensor:
        """The logits of a stream `[n e]`."""
        logits: Tensor = self.head(stream if self.norm is None else self.norm(stream))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def require_sum(self) -> None:
        """Refuse a model whose stream is not the sum of what its heads and MLPs hand over."""
        name = type(self.model).__name__
        if self.cap is not None:
            raise RefusedModel(f"{name} caps its logits, so they are no sum of what its parts say")
        known = [self.begins, *self.leaves]
        known += [before + added for before, added in zip(known, self.adds, strict=False)]
        for norm, x, y in self.norms:
            if x.shape != self.begins.shape:
                continue  # of queries or keys
            if all(_off(x, stream) > CLOSE for stream in known) or any(_off(y, out) == 0 for out in self.leaves):
                raise RefusedModel(
                    f"in {name} a {type(norm).__name__} or a factor stands between attention and the stream, so heads "
                    "have no direct effect of their own"
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
    def outputs(self) -> list[Tensor]:
        """Each layer's output projection `[e h d]`."""
        from heedful.adapters.layers import projections
        from heedful.adapters.transformers import adapt
        from heedful.adapters.weights import read_weights

        names = adapt(self.model, None).layer_names
        return [read_weights(projections(self.model, name, i)).o for i, name in enumerate(names)]


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
