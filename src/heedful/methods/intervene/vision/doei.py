"""o_i <- (1 + w_i) o_i, w_i = up where A_ci + A_ic + a L_ci is high, else -down, the mean over class tokens c."""

from __future__ import annotations

from math import ceil
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, PositiveInt, ProperShare, Share
from heedful.core.sites import Site, at, reads
from heedful.kit.patches import patch_tokens, whole_image
from heedful.kit.topk import top_k

GIVEN, TAKEN = "given", "taken"


class DOEI(Method):
    """Strengthens what attention makes of an image's likely patches, and weakens what it makes of the others.

    A patch is likely where class tokens and it look at one another, by `A`, the mean of the layer's heads, and where it
    is like them, by `L`, cosines above 0 as shares of a class token's. Each class token has likely patches of its own.
    """

    paper = Paper(
        "P284",
        "DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps",
        "Hongjie Zhu, Zeyu Zhang, Guansong Pang, Xu Wang, Shimin Wen, Yu Bai, Daji Ergu, Ying Cai, Yang Zhao",
        2025,
        "2502.15885",
        differs=(
            "The authors' full text was not at hand, and their repository holds no code: this follows their abstract "
            "and the figure there. How tokens are parted into likely and other ones, and by how much they are scaled, "
            "is ours.",
            "Their affinity multiplies likeness by colours, which an attention block is not shown; here it is likeness "
            "of what the block is handed.",
            "The figure draws no residual connection; here what the block adds to the stream is scaled, and not the "
            "stream, whose scale the next norm would take away.",
            "Class activation maps and what refines them afterwards are left to whoever reads the patches.",
        ),
    )
    subjects = ("image",)
    causal = False
    chunk_invariant = False
    share: ProperShare = 0.5  # of the patches that are likely, rounded up; ours
    up: NonNegativeFloat = 0.5  # by how much likely ones are strengthened; ours
    down: Share = 0.5  # by how much the others are weakened; ours
    alike: NonNegativeFloat = 1.0  # a, the weight of likeness beside attention; 0 leaves attention alone; ours
    classes: PositiveInt = 1  # class tokens, the first of all; the paper's models: one for each class

    @classmethod
    def neutral(cls) -> DOEI:
        return cls(up=0.0, down=0.0)

    @classmethod
    def example(cls) -> DOEI:
        return cls(up=1.0, down=1.0)

    def idle(self, call: Call) -> bool:
        return self.up == self.down == 0 or not whole_image(call)

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> None:
        """What class tokens give to each token, and each gives to them, tile by tile."""
        forward, total = call.state.forward, cast(Tensor, call.key).shape[2]
        mean = call.by_key(weights.mean(1), total)  # [b r n]
        rows = max(0, self.classes - (call.rows.start or 0))
        forward[GIVEN] = (*forward.get(GIVEN, ()), mean[:, :rows])
        forward[TAKEN] = (*forward.get(TAKEN, ()), mean[..., : self.classes])

    @at(Site.OUTPUT)
    def part(self, output: Tensor, call: Call) -> Tensor:
        forward, patches = call.state.forward, patch_tokens(self, call)
        if int(patches.min()) < self.classes:
            rule = f"must be at most the {int(patches.min())} tokens before the patches of layer {call.layer}"
            raise FieldError(self, "classes", self.classes, rule, 1)
        sure = torch.cat(forward.pop(GIVEN), 1) + torch.cat(forward.pop(TAKEN), 1).mT  # [b c n]
        if self.alike:
            sure = sure + self.alike * self._likeness(call).to(sure)
        factor = torch.ones_like(sure[:, 0])
        for tokens in (patches, torch.arange(self.classes, device=patches.device)):
            if len(tokens) > 1:  # one alone has none to be parted from
                factor[:, tokens] += torch.where(self.likely(sure[:, :, tokens]), self.up, -self.down).mean(1)
        return output * factor[..., None].to(output)

    def likely(self, sure: Tensor) -> Tensor:
        """Which tokens each class token is surest of, `[b c m]`."""
        return top_k(sure, ceil(self.share * sure.shape[-1]), None)

    def _likeness(self, call: Call) -> Tensor:
        """How like each class token each token is, as shares of it, `[b c n]`."""
        if call.hidden is None:
            rule = "asks how like tokens are by what the block is handed, and it is handed none"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}; alike=0 looks at attention alone")
        unit = normalize(call.hidden.detach().float(), dim=-1)
        cosines = (unit[:, : self.classes] @ unit.mT).clamp(min=0)
        return normalize(cosines, p=1, dim=-1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for share in (0.25, 0.75):
        with torch.no_grad(), attach(model, DOEI(share)) as run:
            print(share, run.difference(**inputs))
