"""eps + s (eps' - eps); in eps' no query sees marked keys, and the marked queries' scores are u s in early steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, RoleName, Share
from heedful.core.sites import Site, at


class _Redirected(Method):
    """Self-attention looks away from the marked places, and in early steps they look about with little preference."""

    causal = False  # what stands in the marked places is gone for those before them too
    role: str
    u: float
    early: float

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.SCORES)
    def look_away(self, scores: Tensor, call: Call) -> Tensor:
        if call.denoising is None or call.denoising.share < self.early:
            inside = call.spread(call.marked_queries(self.role))[..., None]
            scores = torch.where(inside, self.u * scores, scores)
        # the lowest number, as the authors have it: a query that sees marked keys alone still sees them, all alike
        hidden = call.spread(call.marked(self.role))[:, :, None]
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


class AttentiveEraser(Decode):
    """Guides a diffusion model to fill the marked places with what stands around them.

    `variants` names the two runs of each denoising step, which is told by `run.denoising`, and `combine` joins what
    they predict. Outside the marked places the picture is put back after each step, noised as the step asks.
    """

    denoises = True
    paper = Paper(
        "P277",
        "Attentive Eraser: Unleashing Diffusion Model's Object Removal Potential via Self-Attention Redirection "
        "Guidance",
        "Wenhao Sun, Benlei Cui, Xue-Mei Dong, Jingqun Tang",
        2024,
        "2412.12974",
        "AAAI 2025",
        differs=(
            "Read off the authors' code, where it is the marked queries' scores that are flattened: the paper's text "
            "could not be had.",
            "A denoiser's caller puts the picture around the marked places back; no pipeline is here to do it.",
            "With language models, which the authors do not try, next-token logits are guided, and every step is "
            "early.",
        ),
    )
    role: RoleName = "marked"  # the places of what is to go, among the tokens of self-attention
    s: float = 9.0  # how far the guidance goes; the authors: 9; 0 changes nothing, 1 is the redirected run alone
    u: Share = 0.3  # factor on marked queries' scores in early steps; the authors: 0.3
    early: Share = 0.25  # share of the steps that are early; the authors: 10 of 40
    layers: tuple[NonNegativeInt, ...] = ()  # that look away; none: all; the authors: from the middle of a U-Net on

    @classmethod
    def neutral(cls) -> AttentiveEraser:
        return cls(s=0.0)

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        part = _Redirected(self.role, self.u, self.early)
        return {
            "plain": (prompt, Stack()),
            "redirected": (prompt, Stack((part.on(self.layers) if self.layers else part,))),
        }

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        plain, redirected = logits["plain"].float(), logits["redirected"].float()
        return plain if self.s == 0 else plain + self.s * (redirected - plain)


if __name__ == "__main__":
    from heedful import decode, models

    model, tokenizer, _ = models.default()
    text = "The code of the apple is red. The code of the stone is blue. So the code of the stone is"
    ids = tuple(tokenizer(text).input_ids)
    for s in (0.0, 1.0, 2.0):
        asked = Prompt(ids, roles={"marked": ((8, 16),)})
        print(s, tokenizer.decode(decode(model, asked, AttentiveEraser(s=s, u=1.0), new_tokens=3)))
