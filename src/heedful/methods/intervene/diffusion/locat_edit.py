"""m = (W + lambda L)^-1 W m0 with L = D - (A + A^T) / 2: a word's map, made even along the picture's self-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method, Readings
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat


class LOCATEdit(Method):
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
    whole_map = True
    subjects = ("encoder-decoder",)
    role: str = "marked"  # the words that change, among the keys of cross-attention
    evenness: float = 0.78  # lambda; 0 leaves the map as it is; the authors: 0.78
    steepness: float = 2.61  # of a place's say, W = sigmoid(steepness (m0 - middle))^2; the authors: 2.61
    middle: float = 0.4858  # where a place has a quarter of its say; the authors: 0.4858
    threshold: float = 0.3  # of the mask, from the lowest place to the highest; the authors: 0.3

    def __post_init__(self) -> None:
        if not self.role:
            raise FieldError(self, "role", self.role, "must name a role", "marked")
        for name in ("evenness", "steepness"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise FieldError(self, name, getattr(self, name), "must be 0 or more and finite", 0.78)
        for name in ("middle", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise FieldError(self, name, getattr(self, name), "must lie from 0 to 1", 0.3)

    @reads(Site.PATTERN)
    def look(self, pattern: Tensor, call: Call) -> Cat | None:
        mean = pattern.detach().mean(1)  # [b n k]
        if call.cross:
            mean = (mean * call.marked(self.role)[:, :1]).sum(-1)  # [b n]
        kept, kind = call.state.forward, "words" if call.cross else "places"
        so_far = kept.get(kind, torch.zeros_like(mean))
        if so_far.shape != mean.shape:
            rule = f"layer {call.layer} has {mean.shape[1]} places, and layers before it {so_far.shape[1]}"
            raise FieldError(self, "on", call.layer, rule, ".on(layers=...) with layers of one size")
        kept[kind], kept[f"layers of {kind}"] = so_far + mean, kept.get(f"layers of {kind}", 0) + 1
        if "words" not in kept or "places" not in kept:
            return None
        words, places = (kept[name] / kept[f"layers of {name}"] for name in ("words", "places"))
        found = self.refined(words, places)
        # what a layer changes, so that over layers it is the map of their mean, whichever layer is the last
        before, kept["found"] = kept.get("found", 0.0), found
        return Cat.of(f"{call.forward:06d}", found - before)

    def refined(self, words: Tensor, places: Tensor) -> Tensor:
        """A map of places `[b n]`, made even along self-attention `[b n n]`."""
        if words.shape[-1] != places.shape[-1]:
            rule = f"cross-attention has {words.shape[-1]} places, and self-attention {places.shape[-1]}"
            raise FieldError(self, "on", words.shape[-1], rule, ".on(layers=...) with layers of one size")
        edges = (places + places.mT) / 2
        say = torch.sigmoid(self.steepness * (words - self.middle)) ** 2
        laplacian = torch.diag_embed(edges.sum(-1)) - edges
        matrix = torch.diag_embed(say) + self.evenness * laplacian
        return torch.linalg.solve(matrix, (say * words)[..., None])[..., 0]

    def answer(self, readings: Readings) -> list[Tensor]:
        """A map `[b n]` for each forward, in their order."""
        found: dict[str, Tensor] = {}
        for stat in readings.values():
            for name, x in stat.tensors().items():
                found[name] = found.get(name, torch.zeros_like(x)) + x
        return [found[name] for name in sorted(found)]

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
