"""Attention for one's own models: called like `torch.nn.MultiheadAttention`, under any method of heedful."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from heedful.adapters.compiled import as_written
from heedful.adapters.kvcache import seen
from heedful.core.asked import asks
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.method import Part, Stack, as_stack
from heedful.nn.calling import Given, attended
from heedful.nn.masks import Sizes, told
from heedful.nn.served import Served


class Attention(Served):
    """Self and cross attention under a method; without one it is softmax attention.

    What methods learn is parameters of the module. `run` is the module's own, open run: it tells what readers found,
    holds roles and penalties, and can be paused. Modules of one model are told apart by `layer`, one of `depth`: the
    number that `.on(layers=...)` means, the layer of a cache that they share, and the place in schedules by depth.

    `rotary` is the base of a rotary embedding of queries and keys, as in 10_000.0; without one, whoever builds the
    model tells places otherwise.
    """

    in_proj_bias = None  # torch's encoder layers ask both whether they may compute attention without the module
    _qkv_same_embed_dim = False

    @asks
    def __init__(  # noqa: PLR0913 - what a user may set, most of it under torch's names
        self,
        width: int,
        heads: int,
        method: Part | Stack | None = None,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        rotary: float | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        layer: int = 0,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.kv_heads = width, heads, heads if kv_heads is None else kv_heads
        if width < 1:
            raise FieldError(self, "width", width, "must be 1 or more", 64)
        if heads < 1 or width % heads:
            raise FieldError(self, "heads", heads, f"must be 1 or more and divide the width, {width}", 1)
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise FieldError(self, "kv_heads", kv_heads, f"must be 1 or more and divide the heads, {heads}", 1)
        if not 0 <= dropout < 1:
            raise FieldError(self, "dropout", dropout, "must be from 0 up and below 1", 0.1)
        for name, size in (("kdim", kdim), ("vdim", vdim)):
            if size is not None and size < 1:
                raise FieldError(self, name, size, "must be 1 or more; None: the width", width)
        if layer < 0:
            raise FieldError(self, "layer", layer, "must be 0 or more, the number among a model's attention layers", 0)
        if depth is not None and depth <= layer:
            raise FieldError(self, "depth", depth, f"must be above layer {layer}; so many layers has the model", 12)
        self.head_dim = width // heads
        if rotary is not None and not 0 < rotary < float("inf"):
            raise FieldError(self, "rotary", rotary, "must be above 0 and finite, the base of the angles", 10_000.0)
        if rotary is not None and self.head_dim % 2:
            raise FieldError(self, "rotary", rotary, f"turns pairs, and a head has {self.head_dim} dimensions", None)
        self.rotary = rotary
        self.kdim, self.vdim = width if kdim is None else kdim, width if vdim is None else vdim
        self.causal, self.dropout, self.batch_first = causal, dropout, batch_first
        self.layer, self.depth = layer, depth or layer + 1
        self.method = Stack(()) if method is None else as_stack(method)
        kv = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(self.kdim, kv, bias)
        self.v_proj = nn.Linear(self.vdim, kv, bias)
        self.out_proj = nn.Linear(width, width, bias)
        self.reset_parameters()
        self._open()

    def reset_parameters(self) -> None:
        """Draw the projections as torch does."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, method: Part | Stack | None = None, layer: int = 0, depth: int | None = None
    ) -> Self:
        """One with the weights of torch's, which without a method gives equal outputs."""
        for name, there in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
            if there:
                rule = "appends a key that stands at no place in the text, and rules speak of places"
                raise FieldError("from_torch()", name, there, rule, False)
        if type(module).forward is not nn.MultiheadAttention.forward:
            rule = "has a forward of its own, whose answers would be lost"
            raise FieldError("from_torch()", "module", type(module).__name__, rule, "a torch.nn.MultiheadAttention")
        packed: Tensor | None = module.in_proj_weight
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if packed is None else packed
        new = cls(
            module.embed_dim, module.num_heads, method, bias=module.in_proj_bias is not None, dropout=module.dropout,
            batch_first=module.batch_first, kdim=module.kdim, vdim=module.vdim, layer=layer, depth=depth,
        ).to(module.out_proj.weight)  # fmt: skip
        projections = (new.q_proj, new.k_proj, new.v_proj)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        parts = weights.chunk(3) if isinstance(weights, Tensor) else weights
        with torch.no_grad():
            for mine, weight, bias in zip(projections, parts, biases, strict=True):
                _take(mine, weight, bias, module.in_proj_bias)
            _take(new.out_proj, module.out_proj.weight, module.out_proj.bias, module.out_proj.bias)
        return new.train(module.training)

    def size(self) -> Layer:
        """What a method learns parameters by."""
        sizes = self.num_heads, self.kv_heads, self.head_dim, self.head_dim, self.embed_dim
        return Layer(self.layer, *sizes, highest=self.depth - 1)

    def extra_repr(self) -> str:
        more = ", causal=True" if self.causal else ""
        more += "" if self.rotary is None else f", rotary={self.rotary:g}"
        return f"{self.embed_dim}, {self.num_heads}, {self.method!r}, kv_heads={self.kv_heads}{more}"

    @as_written  # the compiler goes around it
    def forward(  # noqa: PLR0913 - the signature is torch's
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What `torch.nn.MultiheadAttention` answers: the output, and the weights, which here are those before dropout.

        Weights not spoken of come along where the method has any; True asks for them, or for an error. A query that
        may see no key gets zeros, where torch gives no number. With a cache, such as transformers' DynamicCache, query,
        key and value are the next tokens of a text, and masks speak of all keys so far.
        """
        if self.run.model is not self:
            raise RefusedModel("Attention is run in a replica, as DataParallel makes them; use one process a device")
        masked = attn_mask is not None or key_padding_mask is not None
        if torch.compiler.is_exporting() and (masked or need_weights is not False):
            raise RefusedModel(
                "torch.export can write down neither the weights of Attention nor a mask, whose values decide what is "
                "done; call it with need_weights=False, and say causal=True where a mask says that"
            )
        single = query.ndim == 2
        q, k, v = (self._rows(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
        if len({len(q), len(k), len(v)}) > 1 or k.shape[1] != v.shape[1]:
            shapes = tuple(tuple(x.shape) for x in (q, k, v))
            raise FieldError(self, "value", shapes, "must have the query's texts and the key's tokens", "key")
        past = seen(cache, self.layer)
        sizes = Sizes(len(q), self.num_heads, q.shape[1], k.shape[1] + past, past)
        given = told(attn_mask, key_padding_mask, self.causal, is_causal, sizes)
        cross = key is not query and not given.mask.causal
        if self.rotary is not None and cross:
            rule = "turns tokens by their places in one text, and another sequence has places of its own"
            raise FieldError(self, "rotary", self.rotary, rule, None)
        if cache is not None and cross:
            rule = "holds the keys of the text itself; another sequence is handed over whole in every call"
            raise FieldError(self, "cache", type(cache).__name__, rule, None)
        asked = Given(q, None if key is query else k, None if value is query else v, given, sizes, cross, cache)
        output, weights = self._one_forward(lambda: attended(self, asked, need_weights))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        output = output if self.batch_first or single else output.transpose(0, 1)
        return (output[0], None if weights is None else weights[0]) if single else (output, weights)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """`[b n e]`, however it is handed over."""
        width = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}[name]
        if x.ndim not in (2, 3) or x.shape[-1] != width:
            order = ("b", "n", width) if self.batch_first else ("n", "b", width)
            raise FieldError(self, name, tuple(x.shape), f"must be of {order}, or of {('n', width)}", order)
        return x[None] if x.ndim == 2 else x if self.batch_first else x.transpose(0, 1)


def _take(mine: nn.Linear, weight: Tensor, bias: Tensor | None, learns: Tensor | None) -> None:
    """Another's weights, which learn or rest as they did there."""
    mine.weight.copy_(weight)
    mine.weight.requires_grad_(weight.requires_grad)
    if mine.bias is not None and bias is not None and learns is not None:
        mine.bias.copy_(bias)
        mine.bias.requires_grad_(learns.requires_grad)
