"""A layer's projections as plain tensors, head by head, and back into the model."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from heedful.adapters.biases import give_bias
from heedful.adapters.layers import block_of
from heedful.adapters.projections import HEADS, SHARED, Projections, transposed
from heedful.adapters.spread import here, whole
from heedful.adapters.wrapped import unwrapped
from heedful.core.errors import RefusedModel, SiteError
from heedful.core.kinds.weights import HeadWeights, Vocabulary


def _matrix(linear: Any) -> Tensor:
    weight = whole(linear.weight.detach())
    return weight.T if transposed(linear) else weight


def _bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else whole(bias.detach()).clone()


def require_here(asked: str, model: nn.Module) -> None:
    """Refuse a model of which a weight is not at hand: on 'meta' until it is used, or spread over processes."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            where = "offloaded (on device 'meta' until it is used)"
        elif isinstance(parameter, DTensor):
            where = f"spread over {parameter.device_mesh.size()} processes"
        else:
            continue
        raise RefusedModel(
            f"{asked} needs all weights at hand, and {name} is {where}; load the model whole, without device_map, "
            "offload or tp_plan"
        )


def _require_plain(p: Projections) -> None:
    """Refuse maps that are more than their weight, and weights that are packed or compute in a way of their own."""
    for letter in "qkvo":
        linear: Any = p.module(letter)
        if type(linear).forward is not nn.Linear.forward and not transposed(linear):
            kind = f"{type(linear).__name__} of {type(linear).__module__}"
            raise RefusedModel(
                f"its {letter} projection is a {kind}, which is more than a linear map; merge an adapter into the "
                "model first, as merge_and_unload() does"
            )
        weight = linear.weight
        if not weight.is_floating_point() or type(weight) not in (nn.Parameter, DTensor):
            form = weight.dtype if type(weight) is nn.Parameter else f"{type(weight).__name__}, {weight.dtype}"
            raise RefusedModel(
                f"the weight of its {letter} projection is quantised ({form}) or not a plain tensor; load the model "
                "without quantisation"
            )


def read_weights(p: Projections) -> HeadWeights:
    """Copies of the four projections, by head."""
    _require_plain(p)
    h, g, d, dv = p.size.heads, p.size.kv_heads, p.size.head_dim, p.size.value_dim

    def rows(letter: str, heads: int, width: int) -> tuple[Tensor, Tensor | None]:
        linear = p.module(letter)
        bias = _bias(linear)
        bias = None if bias is None else p.own(letter, bias)
        matrix = p.own(letter, _matrix(linear)).reshape(heads, width, -1).clone()
        return matrix, None if bias is None else bias.reshape(heads, width)

    with ExitStack() as together:
        for module in {p.module(letter) for letter in "qkvo"}:
            together.enter_context(here(module))
        q, q_bias = rows("q", h, d)
        k, k_bias = rows("k", g, d)
        v, v_bias = rows("v", g, dv)
        o = _matrix(p.module("o"))
        return HeadWeights(q, k, v, o.reshape(o.shape[0], h, dv).clone(), q_bias, k_bias, v_bias, _bias(p.module("o")))


def read_scale(model: nn.Module, name: str) -> Tensor | None:
    """What a block multiplies with that its attention gives, before the stream takes it in, `[e]`; None: nothing."""
    block = model.get_submodule(block_of(model, name) or "")
    for child in block.children():
        if type(child).__name__.endswith("LayerScale"):  # the first is attention's, the second the feed-forward part's
            with here(child):
                (scale,) = child.parameters()
                return whole(scale.detach()).clone()
    return None


def read_vocabulary(model: nn.Module) -> Vocabulary:
    """Copies of the embedding and the unembedding; a model that has not both, as plain tables, is refused."""
    inner = unwrapped(model)
    tables = []
    for word, module in (("embedding", inner.get_input_embeddings()), ("unembedding", inner.get_output_embeddings())):
        weight: Any = getattr(module, "weight", None)
        if type(weight) not in (nn.Parameter, DTensor) or weight.ndim != 2 or not weight.is_floating_point():
            found = "none" if module is None else f"a {type(module).__name__}"
            raise RefusedModel(
                f"{type(inner).__name__} has no {word} that is a plain table of tokens ({found}); load a language "
                "model without quantisation, such as AutoModelForCausalLM gives"
            )
        with here(module):
            tables.append(whole(module.weight.detach()).clone())
    return Vocabulary(*tables)


def write_weights(model: nn.Module, layer: nn.Module, p: Projections, new: HeadWeights) -> None:
    """Put weights back; with fewer heads, into smaller modules."""
    if new.heads % new.kv_heads:
        raise SiteError(
            f"surgery: {new.heads} query heads for {new.kv_heads} key heads, and each key head must serve as many as "
            "the others; drop whole groups with keep_groups()"
        )
    changed = (new.heads, new.kv_heads) != (p.size.heads, p.size.kv_heads)
    if changed:
        name = type(layer).__name__
        if p.rows:
            raise RefusedModel(
                f"{name} maps to queries, keys and values at once; its heads can be silenced, as "
                "PruneHeads(form='zeros') does, not dropped"
            )
        if SHARED not in vars(layer) and new.heads * p.size.kv_heads != new.kv_heads * p.size.heads:
            each = p.size.heads // p.size.kv_heads
            raise RefusedModel(
                f"{name} has a key head for every {each} of its query heads, and cannot be told another number"
            )
        _require_free_heads(layer, p)
    for letter, bias in zip("qkvo", (new.q_bias, new.k_bias, new.v_bias, new.o_bias), strict=True):
        if bias is not None and bool(bias.any()):
            give_bias(model, p.module(letter))
    parts = {
        "q": (new.q.flatten(0, 1), new.q_bias), "k": (new.k.flatten(0, 1), new.k_bias),
        "v": (new.v.flatten(0, 1), new.v_bias), "o": (new.o.flatten(1), new.o_bias),
    }  # fmt: skip
    with torch.no_grad():
        for letter, (matrix, bias) in parts.items():
            _fill(p, letter, matrix, bias)
    if changed:
        _recount(layer, p, new)


def _require_free_heads(layer: nn.Module, p: Projections) -> None:
    """Refuse to drop heads where something beside the projections counts them: it would go on counting the old ones."""
    name = type(layer).__name__
    if "position_bias" in inspect.signature(layer.forward).parameters:
        raise RefusedModel(
            f"{name} takes a position bias with one row a head from another layer; no head can be dropped"
        )
    ours = {id(x) for letter in "qkvo" for x in p.module(letter).parameters()}
    widths = {p.size.heads * p.size.head_dim, p.size.kv_heads * p.size.head_dim}
    for path, parameter in layer.named_parameters():
        counts = widths if "." in path else widths | {p.size.heads}
        if id(parameter) not in ours and counts & set(parameter.shape):
            raise RefusedModel(
                f"{name}.{path} {tuple(parameter.shape)} goes over all heads and is no projection, so what it should "
                "be with fewer is not known; no head can be dropped"
            )


def _fill(p: Projections, letter: str, matrix: Tensor, bias: Tensor | None) -> None:
    linear: Any = p.module(letter)
    mine = p.own(letter, linear.weight.T if transposed(linear) else linear.weight)
    if matrix.shape == mine.shape:
        mine.copy_(matrix)
    else:
        weight = matrix.T if transposed(linear) else matrix
        linear.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=linear.weight.requires_grad)
        if isinstance(linear, nn.Linear):
            linear.out_features, linear.in_features = matrix.shape
        elif transposed(linear):
            linear.nx, linear.nf = weight.shape
    have = getattr(linear, "bias", None)
    if bias is not None and have is not None:
        mine = p.own(letter, have)
        if mine.shape == bias.flatten().shape:
            mine.copy_(bias.flatten())
        else:
            linear.bias = nn.Parameter(bias.flatten().clone(), requires_grad=have.requires_grad)


def _recount(layer: nn.Module, p: Projections, new: HeadWeights) -> None:
    """The head counts that a module keeps for itself."""
    for name in (*HEADS, "num_key_value_heads"):
        if name in vars(layer):
            setattr(layer, name, new.kv_heads if name == "num_key_value_heads" else new.heads)
    if SHARED in vars(layer):
        setattr(layer, SHARED, new.heads // new.kv_heads)
    for name in ("all_head_size", "inner_dim", "embed_dim"):
        if vars(layer).get(name) == p.size.heads * p.size.head_dim:
            setattr(layer, name, new.heads * p.size.head_dim)
