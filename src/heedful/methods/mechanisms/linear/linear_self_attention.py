"""Out_i = sum_j (q_i k_j) v_j: attention without softmax, features or divisor, the model of many proofs."""

from __future__ import annotations

from torch import Tensor

from heedful.authoring import Call, Method, Paper, Site, at
from heedful.kit.running import Running, wide


class LinearSelfAttention(Method):
    """Products of queries and keys are the weights. For models trained with it, and for theory."""

    paper = Paper(
        "P008",
        "One Step of Gradient Descent is Provably the Optimal In-Context Learner with One Layer of Linear "
        "Self-Attention",
        "Arvind Mahankali, Tatsunori B. Hashimoto, Tengyu Ma",
        2023,
        "2307.03576",
        "ICLR 2024",
        differs=(
            "The authors' full text was not at hand: this was read against its abstract and first page.",
            "Queries see what the call's mask lets them see; in the paper the last token alone asks, and not itself.",
            "Heads are mixed by the model's own output projection; the paper reads a number off the sum.",
        ),
    )

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k)
        return running.mixed("state", q, running.cut(k), running.cut(v))


if __name__ == "__main__":
    import torch

    from heedful.nn import Attention

    asked, told = torch.randn(1, 1, 8), torch.randn(1, 20, 8)
    print(Attention(8, 1, LinearSelfAttention(), batch_first=True)(asked, told, told)[0])
