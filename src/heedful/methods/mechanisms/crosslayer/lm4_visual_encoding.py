"""y = W_2 norm(L(W_1 x)): behind the last layer of an encoder of images, a frozen block L of a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from heedful.authoring import Call, FieldError, Fitted, Layer, Method, Paper, PositiveInt, ProperShare, Site, at
from heedful.kit.feature_maps import drawn

NAMES = {
    "norm": "input_layernorm", "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "out": "self_attn.o_proj", "second_norm": "post_attention_layernorm", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


GOOD = "LM4VisualEncoding.of(language.model.layers[-1], language.model.norm)"


class LM4VisualEncoding(Method):
    """Trains an encoder of images with a block of a language model behind it, which itself does not learn.

    `LM4VisualEncoding.of(language.model.layers[-1], language.model.norm)` takes any block of Llama's form, and the norm
    behind the language model's last. Decoders are left alone; `attach(..., only=...)` names the image's layers where a
    model also reads a text, so that this one's last layer has no parameters that it does not use.
    """

    paper = Paper(
        "P152",
        "Frozen Transformers in Language Models Are Effective Visual Encoder Layers",
        "Ziqi Pang, Ziyang Xie, Yunze Man, Yu-Xiong Wang",
        2024,
        "2310.12973",
        "ICLR 2024",
        differs=(
            "The two linear maps are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number; "
            "the authors draw them from a narrow normal distribution.",
            "Blocks are Llama's alone; the authors also try OPT's.",
            "Behind the last layer of an encoder, as in the authors' recognition of images, video and points; their "
            "fusion of images and texts is not here. Causal layers are left alone.",
        ),
    )
    subjects = ("image",)
    block: Fitted | None = None  # the block's weights, see `of`
    head_dim: PositiveInt = 64  # of the block's heads
    eps: ProperShare = 1e-5  # of its norms

    def __post_init__(self) -> None:
        if self.block is None:
            return
        if missing := sorted({*NAMES, "last_norm"} - set(self.block)):
            rule = f"has no {', '.join(missing)}; take it from a language model"
            raise FieldError(self, "block", sorted(self.block), rule, GOOD)
        for name in ("query", "key"):
            if (rows := len(self.block[name])) % self.head_dim:
                raise FieldError(self, "head_dim", self.head_dim, f"must divide the {rows} rows of {name}", 64)

    @classmethod
    def of(cls, block: Any, norm: Any) -> LM4VisualEncoding:
        """With the weights of one block of Llama's form and of the norm behind the last, as they are now."""
        state = block.state_dict()
        if others := sorted(set(state) ^ {f"{name}.weight" for name in NAMES.values()}):
            rule = f"must be a block of Llama's form; what differs is {', '.join(others)}"
            raise FieldError("LM4VisualEncoding.of()", "block", type(block).__name__, rule, GOOD)
        weights = {name: state[f"{told}.weight"].float() for name, told in NAMES.items()}
        found = Fitted({**weights, "last_norm": norm.weight.float()})
        return cls(found, block.self_attn.head_dim, norm.variance_epsilon)

    @classmethod
    def example(cls) -> LM4VisualEncoding:
        random = torch.Generator().manual_seed(0)
        sizes = {"query": (16, 12), "key": (8, 12), "value": (8, 12), "out": (12, 16), "gate": (20, 12),
                 "up": (20, 12), "down": (12, 20)}  # fmt: skip
        weights = {name: drawn(random, *size) for name, size in sizes.items()}
        norms = dict.fromkeys(("norm", "second_norm", "last_norm"), torch.ones(12))
        return cls(Fitted({**weights, **norms}), 4)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if not layer.ends_list:
            return {}
        random, e, inner = torch.Generator().manual_seed(layer.number), layer.width, len(self._block["norm"])
        return {"in": drawn(random, inner, e), "out": drawn(random, e, inner)}

    def idle(self, call: Call) -> bool:
        return not call.ends_list or call.cross or call.mask.causal

    @at(Site.RESIDUAL)
    def encode(self, stream: Tensor, call: Call) -> Tensor:
        x = linear(stream, call.params["in"].to(stream))
        return linear(self.through(x, call), call.params["out"].to(stream))

    def through(self, x: Tensor, call: Call) -> Tensor:
        """What the block makes of tokens `[b n inner]`, which all see one another and have no places."""
        w = {name: each.to(x) for name, each in self._block.items()}
        y = self._normed(x, w["norm"])
        qkv = (linear(y, w[name]).unflatten(-1, (-1, self.head_dim)) for name in ("query", "key", "value"))
        q, k, v = (part.transpose(1, 2) for part in qkv)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=call.is_text[:, None], enable_gqa=True)
        x = x + linear(seen.transpose(1, 2).flatten(2), w["out"])
        y = self._normed(x, w["second_norm"])
        x = x + linear(silu(linear(y, w["gate"])) * linear(y, w["up"]), w["down"])
        return self._normed(x, w["last_norm"])

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.eps)

    @property
    def _block(self) -> Fitted:
        if self.block is None:
            rule = "is not there yet: take one from a language model"
            raise FieldError(self, "block", None, rule, GOOD)
        return self.block


if __name__ == "__main__":
    from heedful import attach, models

    language = models.tiny("llama").model
    method = LM4VisualEncoding.of(language.layers[-1], language.norm)
    model = models.tiny("vit")
    with attach(model, method) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
