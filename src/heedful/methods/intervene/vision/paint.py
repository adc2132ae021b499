"""s <- s + g |s| on the last row, g = alpha for the marked tokens most looked at, beta for outliers among them."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, reads


class PAINT(Method):
    """Raises the scores of the informative tokens of a marked span: local ones by alpha, summary ones by beta.

    The authors act from the third of 32 layers on: name yours with `.on(layers=...)`.
    """

    paper = Paper(
        "P064",
        "PAINT: Paying Attention to INformed Tokens to Mitigate Hallucination in Large Vision-Language Model",
        "Kazi Hasan Ibn Arif, Sajib Acharjee Dip, Khizar Hussain, Lang Zhang, Chris Thomas",
        2025,
        "2501.12206",
        differs=(
            "Any marked span stands for the image; tried on text alone, since no vision model was at hand.",
            "The authors rank image tokens by the vision encoder's own attention from its class token, local ones in "
            "its first layer and summary ones in its last but one; here the row that is edited takes the class token's "
            "part, in the very layer, its weights added up over heads.",
            "This is the authors' code, with one alpha and one beta for all heads. The paper's first version, Fixing "
            "Imbalanced Attention, has a gain for each head, whose formula could not be read: see `.on(heads=...)`.",
            "The authors' classifier-free guidance on logits and their choice of spatial tokens, off by default, are "
            "not here.",
        ),
    )
    causal = False  # only the last token of a call is edited
    chunk_invariant = False
    role: str = "marked"  # the spans that stand for the image
    alpha: float = 0.7  # share of its size that a local token's score gains; the authors' default: 0.7
    beta: float = 0.3  # the same for summary tokens; the authors: 0.3
    share: float = 0.25  # share of the marked tokens that are local, rounded up; the authors: 0.25

    def __post_init__(self) -> None:
        if not self.role:
            raise FieldError(self, "role", self.role, "must name a role", "marked")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise FieldError(self, name, getattr(self, name), "must be 0 or more and finite", 0.5)
        if not 0 <= self.share <= 1:
            raise FieldError(self, "share", self.share, "must lie from 0 to 1", 0.25)

    @classmethod
    def neutral(cls) -> PAINT:
        return cls(alpha=0.0, beta=0.0)

    def idle(self, call: Call) -> bool:
        return call.cross or self.alpha == self.beta == 0

    @reads(Site.QUERY)
    def find_last(self, query: Tensor, call: Call) -> None:
        call.state.forward["last"] = call.last  # tiles see their own rows only

    @at(Site.SCORES)
    def raise_informed(self, scores: Tensor, call: Call) -> Tensor:
        b, h, r, k = scores.shape
        here = torch.arange(r, device=scores.device) + (call.rows.start or 0) == call.state.forward["last"]  # [b|1 r]
        if not here.any():
            return scores
        here = here.expand(b, r)
        row = here.int().argmax(-1)[:, None, None, None]
        seen = call.spread(call.marked(self.role))[:, :, None].expand(b, h, 1, k)
        mine = scores.gather(2, row.expand(b, h, 1, k))
        if call.keep is not None:
            keep = call.keep.expand(b, h, r, k).gather(2, row.expand(b, h, 1, k))
            seen, mine = seen & keep, mine.masked_fill(~keep, torch.finfo(scores.dtype).min)
        given = mine.softmax(-1).masked_fill(~seen, 0.0).sum(1)[:, 0]
        gain = self.gains(given, seen.any(1)[:, 0])[:, None, None].to(scores.dtype)
        return torch.where(here[:, None, :, None], scores + gain * scores.abs(), scores)

    def gains(self, given: Tensor, seen: Tensor) -> Tensor:
        """Each key's gain, from the weight that it is given and whether it is a marked one in sight, all `[b k]`."""
        known = given.detach().double().masked_fill(~seen, torch.nan)
        low, high = known.nanquantile(known.new_tensor([0.25, 0.75]), dim=-1, keepdim=True)
        summary = known > high + 1.5 * (high - low)
        place = known.masked_fill(~seen, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        local = seen & (place < (self.share * seen.sum(-1, keepdim=True)).ceil())
        return torch.where(summary, self.beta, torch.where(local, self.alpha, 0.0))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = "The code of the apple is red. The code of the stone is blue. So the code of the"
    inputs = tokenizer(text, return_tensors="pt")
    for roles in ({"marked": ((0, 8),)}, {"marked": ((8, 16),)}):
        with torch.no_grad(), attach(model, PAINT(share=1.0).on(layers=range(2, 30)), roles=roles) as run:
            top = run(**inputs).logits[0, -1].softmax(-1).topk(3)
        print(roles, [(tokenizer.decode(i), round(float(p), 3)) for p, i in zip(*top, strict=True)])
