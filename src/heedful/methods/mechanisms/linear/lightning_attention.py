"""Out_i = norm(sum_j lambda^(i - j) (q_i k_j) v_j): a linear map of the past that fades, head by head."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu

from heedful.authoring import Call, Method, Paper, Site, SiteError, at
from heedful.kit.running import Running, wide

TINY = 1e-6  # of the norm


class LightningAttention(Method):
    """Linear attention that fades with distance, under a norm in place of a divisor. For models trained with it."""

    paper = Paper(
        "P188",
        "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        "Zhen Qin, Weigao Sun, Dong Li, Xuyang Shen, Weixuan Sun, Yiran Zhong",
        2024,
        "2405.17381",
        "ICML 2024",
        differs=(
            "The blocks are torch products, whose speed is that of any linear attention here; the authors' kernels are "
            "for GPUs.",
            "The gate of TransNormerLLM's attention and its position embedding are not part of it: queries and keys "
            "come with the model's.",
            "Features are taken of queries and keys that are rotated already; the authors rotate after them.",
            "Rates are those of the authors' code, ALiBi's slopes times 1 - l / (L - 1); the paper's text has 8 h / H "
            "times 1 - l / L.",
            "Values are taken as they are, as in the paper's text; an example of the authors has silu of them.",
            "Padding does not count in the distance, and calls that are not causal are refused.",
            "A key head that is shared has a state of its own for each query head, since these fade unlike.",
        ),
    )

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        if not call.mask.causal:
            raise SiteError(
                f"layer {call.layer}: a decay needs a causal call; restrict the method with .on(layers=...)"
            )
        q, k, v = wide(*qkv)
        running = Running(call, k)
        mixed = running.mixed("state", silu(q), silu(running.cut(k)), running.cut(v), decay=rates(call).to(q))
        return mixed * (mixed.square().mean((1, 3), keepdim=True) + TINY).rsqrt()  # over all heads of a token


def slopes(heads: int) -> list[float]:
    """Those of ALiBi: 2^(-8 / h), its square, and so on; where h is no power of 2 filled up from the next one."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return first if power == heads else first + slopes(2 * power)[0::2][: heads - power]


def rates(call: Call) -> Tensor:
    """How fast each head of a layer forgets, `[h]`: -log lambda, less in later layers."""
    place, steps = call.listed.index(call.layer), len(call.listed) - 1
    return torch.tensor(slopes(call.heads), dtype=torch.float64) * (1 - place / max(1, steps) + 1e-5)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, LightningAttention()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
