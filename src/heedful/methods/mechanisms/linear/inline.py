"""Linear attention normalised by subtraction: weights s_ij - mean_j s_ij + 1 / n, and a 3 x 3 kernel of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu

from heedful.authoring import Call, Layer, Method, Paper, Site, at
from heedful.kit.patches import patch_tokens, sides, whole_image
from heedful.kit.running import Running, wide

SIDE = 3  # patches of the local kernel


class InLine(Method):
    """Linear attention that tells q from 2 q and adds the patches around each. For models trained with it."""

    paper = Paper(
        "P102",
        "Bridging the Divide: Reconsidering Softmax and Linear Attention",
        "Dongchen Han, Yifan Pu, Zhuofan Xia, Yizeng Han, Xuran Pan, Xiu Li, Jiwen Lu, Shiji Song, Gao Huang",
        2024,
        "2412.06590",
        "NeurIPS 2024",
        differs=(
            "Queries and keys are taken as they are, scaled by scale / n, as in the authors' code; the formula has no "
            "such factor.",
            "In causal models n and the means are of the keys so far, and there is no local kernel, nor is there where "
            "the patches are no grid.",
            "First weights come from a generator seeded by the layer's number and do not touch the global one.",
        ),
    )
    subjects = ("image", "text")

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        part, inner, outer = layer.width // layer.heads, layer.value_dim, SIDE * SIDE * layer.value_dim

        def drawn(*shape: int, fan: int) -> Tensor:
            return (2 * torch.rand(shape, generator=random) - 1) * fan**-0.5

        return {
            "in": drawn(layer.heads, inner, part, fan=part), "in_bias": drawn(layer.heads, inner, fan=part),
            "out": drawn(layer.heads, outer, inner, fan=inner), "out_bias": drawn(layer.heads, outer, fan=inner),
        }  # fmt: skip

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k)
        k, v = running.cut(k), running.cut(v)
        one = running.ones(v)
        sums = call.spread(running.sums("sums", torch.cat([k, v, one], -1)))
        keys, values, n = sums.split([k.shape[-1], v.shape[-1], 1], -1)
        n = n.clamp(min=1)
        q = q * call.scale / n
        rest = (1 - (q * keys).sum(-1, keepdim=True)) / n
        out = running.mixed("products", q, k, v) + rest * values
        return out if (local := self.local(call, v)) is None else out + local

    def local(self, call: Call, v: Tensor) -> Tensor | None:
        """What a kernel predicted from the whole image makes of each patch's neighbours, `[b h n c]`."""
        if not whole_image(call) or call.hidden is None:
            return None
        p = {name: x.to(v) for name, x in call.params.items()}
        heads = call.hidden.to(v).mean(1).unflatten(-1, (call.heads, -1))  # [b h e/h]
        inner = gelu(torch.einsum("bhc,hdc->bhd", heads, p["in"]) + p["in_bias"])
        kernels = torch.einsum("bhd,hcd->bhc", inner, p["out"]) + p["out_bias"]
        v, tokens = call.spread(v), patch_tokens(self, call)
        image = v[:, :, tokens].mT.reshape(1, -1, *sides(call))  # [1 b*h*c y x]
        found = conv2d(image, kernels.reshape(-1, 1, SIDE, SIDE), padding=SIDE // 2, groups=image.shape[1])
        return torch.zeros_like(v).index_copy(2, tokens, found.view(*v.shape[:2], v.shape[-1], -1).mT)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, InLine()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
