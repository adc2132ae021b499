"""c_j + alpha softmax(entropy)_j, c_j = mean of A_ij over the patches i that get more than t times the mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, PositiveInt
from heedful.core.regions import Region
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.kit.picked import PickedPatches, best

HIGHEST = 3.0  # of the thresholds that are tried
GOOD_BATCHES = [{"input_ids": "...", "pixel_values": "...", "roles": {"patches": ((1, 65),), "image": ((1, 65),)}}]


class VFlowOpt(PickedPatches):
    """Shows a language model the patches that the most regarded patches regard, and, weighed, those of most entropy.

    `of(pixels, size)` is this for some pictures; without them `alpha` must be 0. `fit` takes batches of the model's
    inputs with "roles" beside them and searches `threshold` and `alpha`: those under which the last token, as it
    leaves the last layer, is most like what it is when all patches are seen.
    """

    paper = Paper(
        "P137",
        "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
        "Sihan Yang, Runsen Xu, Chenhang Cui, Tai Wang, Dahua Lin, Jiangmiao Pang",
        2025,
        "2508.05211",
        "ICCV 2025",
        differs=(
            "The importance is that of the authors' code. Settings are drawn at random, thresholds up to 3, where "
            "theirs are searched by a Gaussian process, thresholds up to 50, and the shares of several stages, which "
            "they search too, are one share that is given.",
            "Patches that go are not merged into recycled ones, nor are more dropped in the language model.",
            "A patch that goes is seen by nobody from then on and keeps its place; the authors take it out.",
            "Entropy is of grey levels between -1 and 1, in 256 steps; the authors' code takes them times 255.",
            "Where no patch is regarded enough, the most regarded one counts.",
        ),
    )
    threshold: NonNegativeFloat = 1.0  # t: how many times the mean a patch must get for its own view to count
    alpha: float = 0.0  # weight of the entropies; the authors search from -1 to 1
    entropy: Fitted | None = None  # "entropy" [b|1 p] of each patch, from `of`
    tries: PositiveInt = 24  # settings that a fit tries, this one first
    seed: int = 0  # of the settings

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        where = self.patches(call)
        found = self.importance(weights[:, :, where, where].mean(1))
        return best(found, math.ceil(self.share * found.shape[1]))

    def importance(self, weights: Tensor) -> Tensor:
        """Of each patch `[b p]`, from what patches give each other `[b p p]`."""
        received = weights.mean(1)
        far = received > self.threshold * received.mean(-1, keepdim=True)
        far = (far | (received == received.amax(-1, keepdim=True))).to(weights)
        relevance = torch.einsum("bqk,bq->bk", weights, far) / far.sum(-1, keepdim=True)
        if self.alpha == 0:
            return relevance
        found = None if self.entropy is None else self.entropy["entropy"]
        if found is None or found.shape[1] != relevance.shape[1] or len(found) not in (1, len(relevance)):
            got = None if found is None else tuple(found.shape)
            rule = f"must be of the pictures that are asked about, {list(relevance.shape)}, where alpha is not 0"
            raise FieldError(self, "entropy", got, rule, "method.of(pixel_values, size)")
        return relevance + self.alpha * found.to(relevance).softmax(-1)

    def of(self, pixels: Tensor, size: int) -> VFlowOpt:
        """This for pictures `[b 3 n n]` of values from -1 to 1, whose patches have sides of so many pixels."""
        return replace(self, entropy=Fitted({"entropy": patch_entropy(pixels, size)}))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> VFlowOpt:
        """Try settings, and keep those that change the last token least."""
        batches = list(batches)
        if not batches or not all({"pixel_values", "roles"} <= set(batch) for batch in batches):
            raise FieldError(self, "batches", len(batches), "must be one or more, with pixels and roles", GOOD_BATCHES)
        by = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(self.tries - 1, 2, generator=by) * torch.tensor([HIGHEST, 2.0]) - torch.tensor([0.0, 1.0])
        settings = [(self.threshold, self.alpha), *map(tuple, drawn.tolist())]
        alike = [0.0] * len(settings)
        for batch in batches:
            inputs = {name: x for name, x in batch.items() if name != "roles"}
            pixels, tokens = inputs["pixel_values"], Region(batch["roles"]["image"]).tokens
            mine = self.of(pixels, math.isqrt(pixels.shape[-1] * pixels.shape[-2] // tokens))
            whole = _last(context, replace(mine, share=1.0), inputs, batch["roles"])
            for i, (threshold, alpha) in enumerate(settings):
                some = _last(context, replace(mine, threshold=threshold, alpha=alpha), inputs, batch["roles"])
                alike[i] += float(cosine_similarity(whole, some).mean())
        threshold, alpha = settings[alike.index(max(alike))]
        return replace(self, threshold=threshold, alpha=alpha)


class _Last(Method):
    """The last token as it leaves each layer."""

    subjects = ("image",)

    @reads(Site.RESIDUAL)
    def keep(self, x: Tensor, call: Call) -> Statistic:
        return Cat.of("x", x[:, -1])

    def answer(self, readings: Readings) -> Tensor:
        found: Tensor = readings[max(readings)].value[0]
        return found


def _last(context: FitContext, method: VFlowOpt, inputs: Mapping[str, Tensor], roles: Any) -> Tensor:
    with torch.no_grad(), context.attach(method | _Last()) as run:
        run.roles = roles
        run(**inputs)
        found: Tensor = run[_Last()]
    return found.double()


def patch_entropy(pixels: Tensor, size: int) -> Tensor:
    """Bits of the grey levels of each patch `[b p]`, for pictures `[b 3 n n]` of values from -1 to 1."""
    grey = ((pixels.float().mean(1).clamp(-1, 1) + 1) * 127.5).round().long()
    patches = grey.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).flatten(2)
    share = one_hot(patches, 256).double().mean(2)
    return torch.special.entr(share).sum(-1).float() / math.log(2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22)
    roles = {"patches": ((1, 17),), "image": ((1, 17),)}
    for alpha in (0.0, 1.0):
        with attach(model, VFlowOpt(layer=1, alpha=alpha).of(inputs["pixel_values"], 4), roles=roles) as run:
            print(alpha, run.difference(**inputs))
