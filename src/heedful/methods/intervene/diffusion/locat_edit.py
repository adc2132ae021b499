"""m = (W + lambda L)^-1 W m0 with L = D - (A + A^T) / 2: a word's map, made even along the picture's self-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName, Share
from heedful.methods.intervene.diffusion._refined import Refined


class LOCATEdit(Refined):
    """Finds where in a picture a change of words shall act: `run[method]` has a map of places `[b n]` for each forward.

    `mask` makes one mask of several steps' maps. What samples then keeps the source outside of it, as in
    `x = source + mask * (x - source)` after each step. Layers must be of one number of places: `.on(layers=...)`.
    """

    paper = Paper(
        "P109",
        "LOCATEdit: Graph Laplacian Optimized Cross Attention for Localized Text-Guided Image Editing",
        "Achint Soni, Meet Soni, Sirisha Rambhatla",
        2025,
        "2503.21541",
        "ICCV 2025",
        differs=(
            "The mask alone: blending with the source, pruned text embeddings and the image adapter are not here.",
            "Settings are those of the authors' code for their benchmark.",
            "Self-attention is averaged over the layers it is attached to; the authors take those of 32 x 32 places, "
            "and enlarge maps of 16 x 16 to them.",
        ),
    )
    chunk_invariant = False  # self- and cross-attention must tell of the same places, which are all in one call
    role: RoleName = "marked"  # the words that change, among the keys of cross-attention
    evenness: NonNegativeFloat = 0.78  # lambda; 0 leaves the map as it is; the authors: 0.78
    steepness: NonNegativeFloat = 2.61  # of a place's say, W = sigmoid(steepness (m0 - middle))^2; the authors: 2.61
    middle: Share = 0.4858  # where a place has a quarter of its say; the authors: 0.4858
    threshold: Share = 0.3  # of the mask, from the lowest place to the highest; the authors: 0.3

    def words(self, mean: Tensor, call: Call) -> Tensor:
        return (mean * call.marked(self.role)[:, 0, None]).sum(-1)  # [b n]

    def refined(self, words: Tensor, places: Tensor) -> Tensor:
        """A map of places `[b n]`, made even along self-attention `[b n n]`."""
        edges = (places + places.mT) / 2
        say = torch.sigmoid(self.steepness * (words - self.middle)) ** 2
        laplacian = torch.diag_embed(edges.sum(-1)) - edges
        matrix = torch.diag_embed(say) + self.evenness * laplacian
        return torch.linalg.solve(matrix, (say * words)[..., None])[..., 0]

    def mask(self, maps: list[Tensor]) -> Tensor:
        """Where the change acts, `[b n]`, of maps of one picture in several steps."""
        total = torch.stack(maps).sum(0)
        low, high = total.amin(-1, keepdim=True), total.amax(-1, keepdim=True)
        return total - low > self.threshold * (high - low)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (1, 12))
    layers = tuple(f"model.decoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "encoder_attn"))
    method = LOCATEdit()
    with torch.no_grad(), attach(model, method, roles={"marked": ((2, 4),)}, only=layers) as run:
        run(input_ids=ids, decoder_input_ids=ids)
        print(method.mask(run[method])[0].int().tolist())
