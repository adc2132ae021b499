"""x = x_0 + sum over layers of sum over heads and tokens of A_i W v_i, at the class token, and what MLPs add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.kit.written import map_of, written


@dataclass(frozen=True, eq=False)
class Contributions:
    """What attention writes into the class token's stream, image by image in the order in which they were read."""

    heads: dict[int, Tensor] = field(repr=False)  # by layer [images h e]
    tokens: dict[int, Tensor] = field(repr=False)  # by layer [images h n m]: of each token, along each direction

    @property
    def map(self) -> Tensor:
        """What each token gives along each direction, through all heads and layers, `[images n m]`."""
        return torch.stack([x.sum(1) for x in self.tokens.values()]).sum(0)

    def span(self, layer: int, head: int, pool: Tensor, count: int, rank: int = 80) -> tuple[list[int], list[float]]:
        """Which of the directions `pool [p e]` span what a head says, the best first (the paper's TextSpan).

        Beside them the share of its variance over the images that the first, the first two, and so on explain.
        """
        found = self.heads[layer][:, head].double()
        basis = torch.linalg.svd(found, full_matrices=False).Vh[: min(rank, len(found))]
        pool = pool.double() @ basis.mT @ basis  # within what the head can say
        rest = found - found.mean(0)
        whole, chosen, shares = rest.square().sum(), [], []
        for _ in range(min(count, len(pool))):
            best = int((rest @ pool.mT).std(0).argmax())
            unit = pool[best] / pool[best].norm()
            rest = rest - (rest @ unit)[:, None] * unit
            pool = pool - (pool @ unit)[:, None] * unit
            chosen.append(best)
            shares.append(float(1 - rest.square().sum() / whole))
        return chosen, shares

    def __str__(self) -> str:
        images, heads, _ = next(iter(self.heads.values())).shape
        return (
            f"contributions of {heads} heads in each of {len(self.heads)} layers to the class tokens of {images} images"
        )


class ImageDecomposition(Method):
    """Which heads and which patches an image's class token has its direction from.

    `fit(ImageDecomposition(directions=...), model, ())` copies what heads write with. `directions` are `{"d": [m e]}`
    in the stream before the model's last norm: a classifier's rows, texts' vectors, or differences of classes' means.
    Where a language model stands behind the image's, attach it to that alone, by `only=`.
    """

    paper = Paper(
        "P133",
        "Interpreting CLIP's Image Representation via Text-Based Decomposition",
        "Yossi Gandelsman, Alexei A. Efros, Jacob Steinhardt",
        2024,
        "2310.05916",
        "ICLR 2024",
        differs=(
            "Parts are those of the stream before the last norm; the authors scale each by that norm and project it.",
            "The biases of output projections belong to no head; the authors' code splits them among heads and tokens.",
            "Directions are the caller's, such as class centroids, where a model knows no texts.",
            "What MLPs and the first embedding bring is not told; the authors find that their means would do.",
        ),
    )
    subjects = ("image",)
    last: PositiveInt = 4  # layers that are looked at, the last ones; the paper finds that these say nearly all
    tokens: PositiveInt = 1  # the class token is the last of the first so many; in the paper's models there is one
    directions: Fitted | None = None  # "d" [m e]; None: parts by head alone
    maps: Fitted | None = None  # o.<layer> [e h d] and b.<layer> [e], from a fit
    seed: int | None = None  # without a fit: random projections

    def __post_init__(self) -> None:
        if self.directions is not None and (set(self.directions) != {"d"} or self.directions["d"].ndim != 2):
            raise FieldError(self, "directions", self.directions, 'must hold "d" [m e]', 'Fitted({"d": centroids})')

    @classmethod
    def example(cls) -> ImageDecomposition:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross or call.layer < call.listed.stop - self.last

    @reads(Site.PATTERN, first="tokens")
    def part(self, weights: Tensor, call: Call) -> Statistic | None:
        row = self.tokens - 1 - (call.rows.start or 0)
        if call.value is None or not 0 <= row < weights.shape[2]:
            return None
        value = call.spread(call.value.detach())[:, :, call.cols].to(weights)
        said = weights.detach()[:, :, row, :, None] * value  # [b h k d]
        maps = map_of(self, call, said.shape[1], said.shape[3])[0].to(said)
        found = {"heads": torch.einsum("bhd,ehd->bhe", said.sum(2), maps)}
        if self.directions is not None:
            along = torch.einsum("ehd,me->hdm", maps, self.directions["d"].to(maps))
            each = torch.einsum("bhkd,hdm->bhmk", said, along)
            found["tokens"] = call.by_key(each, call.value.shape[2]).mT
        return Cat({f"{name}.{call.forward:06d}": x for name, x in found.items()})

    def answer(self, readings: Readings) -> Contributions:
        def of(name: str) -> dict[int, Tensor]:
            rows = {n: [x for at, x in sorted(s.tensors().items()) if at.startswith(name)] for n, s in readings.items()}
            return {layer: torch.cat(found) for layer, found in rows.items() if found}

        return Contributions(of("heads."), of("tokens."))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> ImageDecomposition:
        """The output projections of the last layers, with what their blocks scale them by; `batches` may be empty."""
        return replace(self, maps=written(context, self.last))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("vit", image_size=32)
    method = fit(ImageDecomposition(last=2, directions=Fitted({"d": torch.randn(1, 32)})), model, ())
    with torch.no_grad(), attach(model, method) as run:
        run(**models.tiny_inputs(model))
        found = run[method]
    print(found, found.map[0, 1:, 0].reshape(8, 8), found.span(1, 0, torch.randn(9, 32), 2))
