"""w = W u, u_p = sum_q sum_m a_pqm cos(m s_q) + b_pqm sin(m s_q): learned waves of a row's scores make its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.feature_maps import drawn


class KolmogorovArnoldAttention(Method):
    """Fourier-KArAt: weights of any sign, which need not add up to one. For image models trained with it."""

    paper = Paper(
        "P001",
        "Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?",
        "Subhajit Maity, Killian Hitsman, Xin Li, Aritra Dutta",
        2025,
        "2503.10632",
        differs=(
            "Read from the authors' text; their code is not out. Coefficients are drawn with a variance of 1 over "
            "waves and tokens, as common code for layers of waves draws them; the paper's table says 1. W is drawn as "
            "torch.nn.Linear draws it.",
            "Each layer has waves of its own (blockwise); the authors also let all layers share them, and try other "
            "functions than waves.",
            "For images, which have at most as many tokens as there are places. A key that a token may not see adds "
            "no wave and gets no weight.",
        ),
    )
    subjects = ("image",)
    tokens: PositiveInt = 197  # N, of every image, a class token counted; that of ViT-B/16
    rank: PositiveInt = 12  # r, what the waves of a row add up to before W; the paper: 12
    waves: PositiveInt = 3  # per score; the paper: 3 in ViT-Tiny and -Small, 1 in ViT-Base

    @classmethod
    def example(cls) -> KolmogorovArnoldAttention:
        return cls(24, 4, 2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, size = torch.Generator().manual_seed(layer.number), (layer.heads, self.waves, self.rank, self.tokens)
        cos, sin = torch.randn(2, *size, generator=random) / math.sqrt(self.tokens * self.waves)
        out = drawn(random, layer.heads * self.tokens, self.rank).unflatten(0, (layer.heads, -1))
        return {"cos": cos, "sin": sin, "out": out}

    @at(Site.NORMALISE)
    def wave(self, scores: Tensor, call: Call) -> Tensor:
        places = call.cols
        if isinstance(places, slice):
            places = torch.arange(scores.shape[-1], device=scores.device) + (places.start or 0)
        if int(places.max()) >= self.tokens:
            raise SiteError(
                f"{self!r}, layer {call.layer}: has waves for {self.tokens} tokens, and there are more; give it as "
                "many as an image has"
            )
        p = {name: x.to(scores.dtype) for name, x in call.params.items()}
        seen = scores if call.keep is None else scores.masked_fill(~call.keep, 0.0)  # a hidden score is huge
        total = scores.new_zeros(*scores.shape[:-1], self.rank)
        for m in range(self.waves):
            for name, wave in (("cos", torch.cos), ("sin", torch.sin)):
                found = wave((m + 1) * seen)
                if call.keep is not None:
                    found = found * call.keep
                total = total + found @ p[name][:, m][..., places].mT
        return total @ p["out"][:, places].mT


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, KolmogorovArnoldAttention(5)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
