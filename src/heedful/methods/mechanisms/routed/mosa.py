"""r_i head_i, r = sigmoid(x W_r): each head chooses the k tokens of highest r, which see those chosen before them."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Mask, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.core.flags import both
from heedful.core.positions import spread_heads
from heedful.kit.chosen import Reached, meeting
from heedful.kit.feature_maps import drawn
from heedful.kit.running import past_keys, text_keys
from heedful.kit.told import of_keys
from heedful.kit.topk import top_k

LEAST = 2  # tokens that a head chooses; the authors' code


class MoSA(Method):
    """Mixture of sparse attention: heads are experts that choose their tokens. For models trained with it.

    The authors' best models have some heads that see everything: `MoSA().on(heads=range(2, 12))`.
    """

    paper = Paper(
        "P106",
        "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing",
        "Piotr Piękos, Róbert Csordás, Jürgen Schmidhuber",
        2025,
        "2505.00315",
        differs=(
            "Pairs are left out by a mask: projections are made for all tokens, and what the authors save by gathering "
            "those that are chosen is not saved here.",
            "A choice among all tokens of a text tells earlier ones of later ones. New tokens choose anew among all so "
            "far, and what was given before stays. Tokens that a cache took up without it are never chosen.",
            "The position embedding is the model's; the authors turn half of each head.",
        ),
    )
    one_text = True
    subjects = ("text", "image")
    causal = False
    chunk_invariant = False
    sparsity: PositiveInt = 16  # tokens of a text to each that a head chooses; the paper: 2 to 256

    @classmethod
    def example(cls) -> MoSA:
        return cls(4)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return {"router": drawn(random, layer.heads, layer.width)}

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def choose(self, mask: Mask, call: Call) -> Mask:
        total, n = len(call.keys), len(call.queries)
        text = text_keys(call, total)
        text = torch.ones(1, 1, total, dtype=torch.bool) if text is None else spread_heads(text, call.heads)
        routes = self._wanted(call)
        text = text.to(routes.device) & routes.isfinite()
        count = text.sum(-1, keepdim=True)
        chosen = top_k(routes, (count // self.sparsity).clamp(min=LEAST), text)
        start = past_keys(call, n, total)
        mine, theirs = chosen[:, :, None, start : start + n], chosen[:, :, None]  # one part for each head
        some_head = chosen.flatten(0, 1).any(0)
        return mask & Reached(
            lambda rows, cols: both(mine[..., rows].mT, theirs[..., cols]),
            lambda rows: some_head,
            gather=lambda: meeting(mine, theirs),
        )

    @at(Site.HEAD_OUTPUT)
    def weigh(self, heads: Tensor, call: Call) -> Tensor:
        return heads * self._routes(call)[..., None].to(heads.dtype)

    def _routes(self, call: Call) -> Tensor:
        """How much each head wants each of the call's tokens, `[b h n]`."""
        if call.hidden is None:
            raise SiteError(f"MoSA, layer {call.layer}: the block is not handed hidden states to route by")
        weight = call.params["router"]
        return (call.hidden.flatten(1, -2).to(weight.dtype) @ weight.mT).sigmoid().mT

    def _wanted(self, call: Call) -> Tensor:
        """The same of all keys, `[b h k]`."""
        return of_keys(call, "routes", self._routes(call).detach()[..., None])[..., 0]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, MoSA(4)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
