"""o = windowed attention of x + scan of x: h_t = exp(s_t A) h_(t-1) + s_t B_t u_t, y_t = C_t h_t + D u_t, four ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, pad, silu, softplus

from heedful.authoring import Call, FieldError, Layer, Mask, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.feature_maps import drawn, feature_map, laid_back, with_bias
from heedful.kit.patches import sides
from heedful.kit.running import wide
from heedful.methods.mechanisms.local._neighbours import narrowed

WAYS = 4  # in which an image is gone through
SLOWEST, FASTEST, LEAST = 1e-3, 0.1, 1e-4  # steps that a scan begins with; Mamba


class LaMamba(Method):
    """Patches attend within a window, and a selective scan hands on what is beyond. For image models trained with it.

    Let every other layer have windows that begin half a window in: `LaMamba(8).on(layers=[0, 2]) |
    LaMamba(8, 4).on(layers=[1, 3])`.
    """

    paper = Paper(
        "P091",
        "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba",
        "Yunxiang Fu, Chaoqi Chen, Yizhou Yu",
        2024,
        "2408.02615",
        differs=(
            "Scan and attention stand side by side behind the layer's own norm, and their sum goes to the stream; the "
            "authors have the scan first, with a norm and a residual of its own, and attention behind it.",
            "It is the mixer alone, in any vision transformer: a diffusion step's and a class's shift, scale and gate, "
            "the U-Net and its stages are not here, nor is the learned bias of offsets within a window.",
            "The scan goes along rows and columns of any number; the authors have square images of even sides.",
            "Tokens outside the grid of patches, as a class token, attend as ever, are seen by all, and are not "
            "scanned; the authors' models have none.",
            "Layers that are causal, or whose patches lie on no grid, are refused.",
            "The convolution has a bias, as the authors' code has unless told otherwise; their XL model's has none.",
            "Weights are drawn as the authors draw them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    window: PositiveInt = 8  # patches along a side; the authors' code: 8
    shift: int = 0  # patches before the first whole window, if there are more; the authors: half a window, in turns
    state: PositiveInt = 16  # numbers that each scanned channel remembers; the authors' code: 16, their XL model: 1
    ratio: PositiveInt = 2  # channels scanned, for each of the model's; the authors' code: 2

    def __post_init__(self) -> None:
        if not 0 <= self.shift < self.window:
            raise FieldError(self, "shift", self.shift, "must be 0 or more, and less than the window", self.window // 2)

    @classmethod
    def example(cls) -> LaMamba:
        return cls(2, 1, 3, 1)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        d, n, rank = self.ratio * e, self.state, math.ceil(e / 16)
        often = torch.rand(WAYS, d, generator=random) * math.log(FASTEST / SLOWEST) + math.log(SLOWEST)
        step = often.exp().clamp(min=LEAST)
        return {
            "in": drawn(random, 2 * d, e), **with_bias(random, "near", d, 1, 3, 3),
            "told": torch.stack([drawn(random, rank + 2 * n, d) for _ in range(WAYS)]),
            "step": (torch.rand(WAYS, d, rank, generator=random) * 2 - 1) * rank**-0.5,
            "step_bias": step + (-(-step).expm1()).log(),  # whose softplus is the step
            "rate": torch.arange(1.0, n + 1).log().repeat(WAYS, d, 1), "skip": torch.ones(WAYS, d),
            "norm": torch.ones(d), "norm_bias": torch.zeros(d), "out": drawn(random, e, d),
        }  # fmt: skip

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        if "patches" not in call.roles:
            return mask  # what is no image `scan` refuses, and says why

        def sees(axis: int, query: Tensor, key: Tensor) -> Tensor:
            whole = sides(call)[axis] <= self.window  # one window, wherever it would begin
            back = 0 if whole else self.window - self.shift
            return (query + back) // self.window == (key + back) // self.window

        return narrowed(mask, call, sees)

    @at(Site.OUTPUT)
    def scan(self, output: Tensor, call: Call) -> Tensor:
        if call.hidden is None:
            raise SiteError(f"{self!r}, layer {call.layer}: the layer's input is not known, and is what is scanned")
        x, *rest = wide(feature_map(self, call, call.hidden), *call.params.values())
        p = {name: w.to(x) for name, w in zip(call.params, rest, strict=True)}
        scanned, gate = conv2d(x, p["in"][..., None, None]).chunk(2, 1)
        scanned = silu(conv2d(scanned, p["near"], p["near_bias"], padding=1, groups=scanned.shape[1]))
        paths = _snakes(*sides(call), x.device)
        found = self._selected(scanned.flatten(2)[:, :, paths].transpose(1, 2), p)  # [b ways d n]
        back = paths.argsort(1)[None, :, None].expand_as(found)
        found = layer_norm(found.gather(3, back).sum(1).mT, p["norm"].shape, p["norm"], p["norm_bias"]).mT
        found = conv2d(found.view_as(gate) * silu(gate), p["out"][..., None, None])
        return output + laid_back(self, call, found, torch.zeros_like(output))

    def _selected(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """What each place of the ways `[b ways d n]` gets of those before it and of itself, as these tell."""
        n = self.state
        told = p["told"] @ x
        step, into, out = told.split([told.shape[2] - 2 * n, n, n], 2)
        step = softplus(p["step"] @ step + p["step_bias"][..., None])
        return _scanned(x, step, -p["rate"].exp(), into, out) + p["skip"][..., None] * x


def _scanned(x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """`out_t h_t` with `h_t = exp(step_t rate) h_(t-1) + step_t x_t into_t` on each way.

    Pieces of a way are gone through side by side, at first for what each leaves behind, and then from there on.
    """
    tokens = x.shape[-1]
    size = math.isqrt(tokens)

    def places(told: Tensor) -> Tensor:
        """One after another of all pieces, `[size ... pieces]`; a step of 0 leaves all as it is."""
        return pad(told, (0, -tokens % size)).unflatten(-1, (-1, size)).movedim(-1, 0).contiguous()

    x, step = places(x)[..., None], places(step)[..., None]  # [size b ways d pieces 1]
    into, out = (places(told).mT.contiguous()[:, :, :, None] for told in (into, out))  # [size b ways 1 pieces state]
    rate = rate[:, :, None]
    given = [*zip(step.unbind(), (step * x).unbind(), into.unbind(), out.unbind(), strict=True)]
    kept = (step.sum(0) * rate).exp()
    held = torch.zeros_like(kept)
    for now, x_t, into_t, _ in given:
        held = (now * rate).exp() * held + x_t * into_t
    before = [torch.zeros_like(kept[..., 0, :])]
    for end, share in zip(held.unbind(-2), kept.unbind(-2), strict=True):
        before.append(share * before[-1] + end)
    held, found = torch.stack(before[:-1], -2), []
    for now, x_t, into_t, out_t in given:
        held = (now * rate).exp() * held + x_t * into_t
        found.append((held * out_t).sum(-1))
    return torch.stack(found, -1).flatten(-2)[..., :tokens]


def _snakes(rows: int, cols: int, device: torch.device) -> Tensor:
    """Patches in the order of four ways through an image, each of which turns at its borders `[ways rows * cols]`."""
    grid = torch.arange(rows * cols, device=device).view(rows, cols)
    ways = []
    for lines in (grid, grid.flip(0), grid.T.flip(1), grid.T.flip(0, 1)):
        there = torch.arange(len(lines), device=device)[:, None] % 2 == 0
        ways.append(torch.where(there, lines, lines.flip(1)).flatten())
    return torch.stack(ways)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=16)
    for window in (1, 2, 4):
        with attach(model, LaMamba(window, state=4)) as run:
            print(window, run.difference(**models.tiny_inputs(model)))
