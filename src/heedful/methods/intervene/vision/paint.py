"""s <- s + g |s| on the last row, g = alpha for the marked tokens most looked at, beta for outliers among them."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName, Share
from heedful.core.sites import Site, at, reads


class PAINT(Method):
    """Raises the scores of the informative tokens of a marked span: local ones by alpha, summary ones by beta.

    The authors act from the third of 32 layers on: name yours with `.on(layers=...)`. With `by_class` the image's own
    encoder tells which tokens are informative, as theirs does: name its first layer and its last but one as well. Where
    its patches stand is the role `patches`, and they are in the order of the marked tokens.
    """

    paper = Paper(
        "P064",
        "PAINT: Paying Attention to INformed Tokens to Mitigate Hallucination in Large Vision-Language Model",
        "Kazi Hasan Ibn Arif, Sajib Acharjee Dip, Khizar Hussain, Lang Zhang, Chris Thomas",
        2025,
        "2501.12206",
        differs=(
            "Any marked span may stand for the image. Without `by_class` the row that is edited takes the class "
            "token's part, in the very layer.",
            "The authors round numbers of tokens down; here all outliers are summary tokens, and the number of local "
            "ones is rounded up.",
            "This is the authors' code, with one alpha and one beta for all heads. The paper's first version, Fixing "
            "Imbalanced Attention, has a gain for each head, whose formula could not be read: see `.on(heads=...)`.",
            "The authors' classifier-free guidance on logits and their choice of spatial tokens, off by default, are "
            "not here.",
        ),
    )
    one_text = True
    causal = False  # only the last token of a call is edited
    chunk_invariant = False
    role: RoleName = "marked"  # the spans that stand for the image
    alpha: NonNegativeFloat = 0.7  # share of its size that a local token's score gains; the authors' default: 0.7
    beta: NonNegativeFloat = 0.3  # the same for summary tokens; the authors: 0.3
    share: Share = 0.25  # share of the marked tokens that are local, rounded up; the authors: 0.25
    by_class: bool = False  # ranked by the encoder's class token, in its first layer and its last but one; the authors

    @classmethod
    def neutral(cls) -> PAINT:
        return cls(alpha=0.0, beta=0.0)

    def idle(self, call: Call) -> bool:
        return call.cross or self.alpha == self.beta == 0

    @reads(Site.PATTERN, when="by_class")
    def ask_class(self, weights: Tensor, call: Call) -> None:
        """Keep for the language model what an encoder's class token gives to each patch, heads added up."""
        layers = {"local": call.listed[0], "summary": call.listed[-2:][0]}
        names = [name for name, layer in layers.items() if layer == call.layer]
        if call.causal or not names or call.rows.start:
            return
        patch = call.numbers("patches")[0, 0] >= 0
        if patch[0]:
            rule = "must leave out the encoder's first token, of the class"
            raise FieldError(
                "attach()", "roles", {"patches": ((0, len(patch)),)}, rule, {"patches": ((1, len(patch)),)}
            )
        call.state.forward.update(dict.fromkeys(names, weights[:, :, 0, patch].sum(1)))

    @reads(Site.QUERY)
    def find_last(self, query: Tensor, call: Call) -> None:
        call.state.forward["last"] = call.last  # tiles see their own rows only

    @at(Site.SCORES)
    def raise_informed(self, scores: Tensor, call: Call) -> Tensor:
        b, h, r, k = scores.shape
        here = torch.arange(r, device=scores.device) + (call.rows.start or 0) == call.state.forward["last"]  # [b|1 r]
        if not here.any() or (self.by_class and not call.causal):
            return scores
        here = here.expand(b, r)
        row = here.int().argmax(-1)[:, None, None, None]
        seen = call.spread(call.marked(self.role))[:, :, None].expand(b, h, 1, k)
        mine = scores.gather(2, row.expand(b, h, 1, k))
        if call.keep is not None:
            keep = call.keep.expand(b, h, r, k).gather(2, row.expand(b, h, 1, k))
            seen, mine = seen & keep, mine.masked_fill(~keep, torch.finfo(scores.dtype).min)
        if self.by_class:
            local, summary = (self._told(name, call).expand(b, -1) for name in ("local", "summary"))
        else:
            local = summary = mine.softmax(-1).masked_fill(~seen, 0.0).sum(1)[:, 0]
        gain = self.gains(local, summary, seen.any(1)[:, 0])[:, None, None].to(scores.dtype)
        return torch.where(here[:, None, :, None], scores + gain * scores.abs(), scores)

    def _told(self, name: str, call: Call) -> Tensor:
        """What the encoder's class token gives to the patch that each key is, `[b k]`; 0 to others."""
        found = call.state.forward.get(name, call.state.cache.get(name))
        if found is None:
            rule = "wants the encoder's first layer and its last but one among the layers that it acts in"
            raise FieldError(self, "by_class", True, rule, False)
        call.state.cache[name] = found  # what is decoded later has no encoder before it
        number = call.numbers(self.role)[:, 0]
        if int(number.max()) >= found.shape[1]:
            rule = f"must hold the {found.shape[1]} patches of the encoder"
            good = {self.role: ((1, 1 + found.shape[1]),)}
            raise FieldError("attach()", "roles", {self.role: int(number.max()) + 1}, rule, good)
        number = number.expand(len(found), -1)
        return found.gather(1, number.clamp(min=0)).masked_fill(number < 0, 0.0)

    def gains(self, local: Tensor, summary: Tensor, seen: Tensor) -> Tensor:
        """Each key's gain, by what tells local and summary tokens, and whether it is a marked one in sight: `[b k]`."""
        known = summary.detach().double().masked_fill(~seen, torch.nan)
        low, high = known.nanquantile(known.new_tensor([0.25, 0.75]), dim=-1, keepdim=True)
        outlier = known > high + 1.5 * (high - low)
        ranked = local.detach().double().masked_fill(~seen, -1.0)
        place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = seen & (place < (self.share * seen.sum(-1, keepdim=True)).ceil())
        return torch.where(outlier, self.beta, torch.where(chosen, self.alpha, 0.0))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = "The code of the apple is red. The code of the stone is blue. So the code of the"
    inputs = tokenizer(text, return_tensors="pt")
    for roles in ({"marked": ((0, 8),)}, {"marked": ((8, 16),)}):
        with torch.no_grad(), attach(model, PAINT(share=1.0).on(layers=range(2, 30)), roles=roles) as run:
            top = run(**inputs).logits[0, -1].softmax(-1).topk(3)
        print(roles, [(tokenizer.decode(i), round(float(p), 3)) for p, i in zip(*top, strict=True)])
