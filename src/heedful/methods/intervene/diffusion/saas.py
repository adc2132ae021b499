"""A <- A (1 + M_i (scale r_i - 1)) at an instruction's words, r_i = what M_i's places give the source / give them."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, RoleName, Share
from heedful.core.regions import Region, by_text, numbers
from heedful.core.sites import Site, at

LEVELS = 256  # that Otsu's method parts
LITTLE = 1e-6  # beside what the words are given, which may be 0
FAINT = 1e-8  # beside the height of a map, which may be 0


class SaaS(Method):
    """Gives each of a prompt's instructions as much of the picture as the source takes where the instruction acts.

    For unified models, which have words, a source picture and the one in the making in one sequence. Roles name them:
    `{"source": spans, "target": Region(spans, grid), "first": spans, "second": spans}`. Where an instruction acts is
    read off the step before, so the run is told of steps by `run.denoising`; where it is told of none, off the layers
    before. For models whose first layers look at nothing in particular: `.on(layers=...)`.
    """

    paper = Paper(
        "P278",
        "Scale Your Instructions: Enhance the Instruction-Following Fidelity of Unified Image Generation Model by "
        "Self-Adaptive Attention Scaling",
        "Chao Zhou, Tianyi Wei, Nenghai Yu",
        2025,
        "2507.16240",
        "ICCV 2025",
        differs=(
            "Read off the authors' code; the paper's text could not be had.",
            "Instructions are roles; the authors part a prompt at its commas.",
            "A map is smoothed beyond the borders as if nothing were there, as theirs; one without a grid as a row.",
            "Each picture of a batch has factors of its own; the authors' code makes one picture at a time, and reads "
            "and scales the first row of its batch alone, so that rows which guide it without the words stay as they "
            "are. Here each row is scaled.",
        ),
    )
    subjects = ("image",)
    whole_map = True
    causal = False
    chunk_invariant = False
    scale: PositiveFloat = 1.0  # beside the factor that is found; the authors: 1
    until: Share = 0.4  # share of the steps up to which is scaled; the authors: 20 of 50
    # of the maps, in places; 0 leaves them as they are; the authors: 1
    blur: Annotated[float, Interval(ge=0, le=16)] = 1.0
    source: RoleName = "source"  # the picture that is given
    target: RoleName = "target"  # the picture that is made
    instructions: tuple[str, ...] = ("first", "second")  # the words of each

    def __post_init__(self) -> None:
        if not self.instructions or "" in self.instructions:
            raise FieldError(self, "instructions", self.instructions, "must name one role or more", ("first", "second"))

    @classmethod
    def example(cls) -> SaaS:
        return cls(scale=3.0, source="bos", target="answer", instructions=("marked",))

    def idle(self, call: Call) -> bool:
        late = call.denoising is not None and call.denoising.share > self.until
        return call.cross or call.phase is Phase.DECODE or late

    @at(Site.PATTERN)
    def follow(self, pattern: Tensor, call: Call) -> Tensor:
        region = call.region(self.target)
        at_rows = by_text(numbers, call.regions(self.target), call.q_pos)[:, 0, :, None]
        laid = (at_rows == torch.arange(region.tokens, device=pattern.device)).to(pattern.dtype)  # [b|1 q n]
        words = torch.stack([call.marked(role)[:, 0] for role in self.instructions], 1).to(pattern.dtype)  # [b|1 i k]
        looks = self._before(len(pattern), call)
        if looks is not None:
            more = (laid @ (self.factors(looks, region) - 1)) @ words  # [b q k]
            given, pattern = _size(pattern), pattern * (1 + more)[:, None]
            pattern = pattern * given / _size(pattern).clamp(min=torch.finfo(pattern.dtype).tiny)
        mean = pattern.detach().mean(1)
        given = torch.cat([call.marked(self.source)[:, 0, None].to(mean.dtype).expand(len(words), -1, -1), words], 1)
        summed = call.state.forward["looks"]
        summed["places"] = summed.get("places", 0.0) + laid.mT @ mean @ given.mT  # [b n 1+i]
        return pattern

    def factors(self, looks: Tensor, region: Region) -> Tensor:
        """What the words of each instruction are to be multiplied with at each place, `[b n i]`.

        `looks`, `[b n 1+i]`, is what each place gives to the source and to the words of each instruction.
        """
        source, words = looks[..., :1], looks[..., 1:]
        grid = region.grid or (1, region.tokens)
        if len(grid) != 2:
            raise FieldError("attach()", "roles", grid, f"{self.target!r} must have rows and columns", (16, 16))
        mask = otsu(self._smoothed(words.mT.unflatten(-1, grid)).flatten(2)).mT
        ratio = (source * mask).sum(1, keepdim=True) / ((words * mask).sum(1, keepdim=True) + LITTLE)
        return torch.where(mask, self.scale * ratio, 1.0)

    def _smoothed(self, maps: Tensor) -> Tensor:
        """Maps `[b i rows cols]` under a Gaussian."""
        if self.blur == 0:
            return maps
        reach = round(3 * self.blur)
        taps = torch.exp(-(torch.arange(-reach, reach + 1, device=maps.device) ** 2) / (2 * self.blur**2))
        taps = (taps / taps.sum()).to(maps.dtype)
        return F.conv2d(maps.flatten(0, 1)[:, None], torch.outer(taps, taps)[None, None], padding=reach).view_as(maps)

    def _before(self, texts: int, call: Call) -> Tensor | None:
        """What places gave in all layers of the step before, or in the layers before where no step is told."""
        forward, kept = call.state.forward, call.state.run
        own = forward.setdefault("looks", {})  # all layers of this forward add to it
        if call.denoising is None:
            return own.get("places")
        step = call.denoising.number
        if step < kept.get("step", step):
            kept.clear()
        if step > kept.get("step", step):
            kept["before"] = kept["now"]
        kept["step"], kept["now"] = step, own
        before = kept.get("before", {}).get("places")
        return before if before is not None and len(before) == texts else None


def _size(pattern: Tensor) -> Tensor:
    """What a row's weights add up to, each without its sign: another method may have made some negative."""
    return pattern.abs().sum(-1, keepdim=True)


def otsu(maps: Tensor) -> Tensor:
    """Which places of maps `[... n]` are bright, by the threshold that parts 256 levels best."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    level = ((maps - low) / (high - low + FAINT) * (LEVELS - 1)).long()
    levels = torch.arange(LEVELS, device=maps.device)
    share = (level[..., None] == levels).double().mean(-2)  # [... levels]
    dark, sum_of_dark = share.cumsum(-1), (share * levels).cumsum(-1)
    apart = (dark * sum_of_dark[..., -1:] - sum_of_dark).square() / (dark * (1 - dark)).clamp(min=LITTLE)
    return level > apart.argmax(-1, keepdim=True)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32, num_hidden_layers=3)
    roles = {"source": ((1, 17),), "target": Region(((17, 65),), (6, 8)), "first": ((0, 1),)}
    with torch.no_grad(), attach(model, SaaS(instructions=("first",)), roles=roles) as run:
        print(run.difference(**models.tiny_inputs(model)))
