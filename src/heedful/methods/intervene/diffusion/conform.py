"""x <- x - rate dL/dx, L = -log e^(c/T) / (e^(c/T) + sum e^(c'/T)): c alike words' maps, c' maps of other groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat
from heedful.methods.intervene.diffusion._map_loss import Guidance, smoothed


class CONFORM(Guidance):
    """Moves what a diffusion model denoises so that the maps of words that belong together meet, and others part.

    Every group is a role that names its words among the keys, such as a thing and what it is like. Maps of the step
    before, where the run was told the step, stand beside those of this one.
    """

    paper = Paper(
        "P105",
        "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models",
        "Tuna Han Salih Meral, Enis Simsar, Federico Tombari, Pinar Yanardag",
        2023,
        "2312.06059",
        "CVPR 2024",
        differs=(
            "Groups of single words are parted by the maps of two steps alone, and have no loss in a step that stands "
            "alone, as the authors' code by default; it has a margin loss for them too.",
            "Words share places by attention as it is, as in the authors' notebook; their pipeline, unless told, by a "
            "softmax over words of 100 times that.",
            "Twenty moves within steps 0, 10 and 20 are left to the caller: call run and moved again.",
            "Maps are averaged over the layers it is attached to; the authors take those of 16 x 16 places.",
        ),
    )
    groups: tuple[str, ...] = ("first", "second")  # roles, each the words of one thing
    temperature: PositiveFloat = 0.5  # T; the authors: 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.groups)) < 2 or len(set(self.groups)) < len(self.groups):
            raise FieldError(self, "groups", self.groups, "must name two or more roles", ("first", "second"))

    @classmethod
    def example(cls) -> CONFORM:
        return cls(groups=("marked", "bos"))

    def loss(self, maps: Tensor, call: Call) -> Tensor:
        each = torch.stack([call.marked(group)[:, 0] for group in self.groups])  # [groups b|1 k]
        words = each.expand(-1, len(maps), -1)
        looks = [
            F.normalize(smoothed(self, x, self.grid), dim=1) for x in (maps, self._before(maps, call)) if x is not None
        ]
        whose, unit = torch.cat([words] * len(looks), -1), torch.cat(looks, -1)  # [groups b m], [b n m]
        like = (unit.mT @ unit / self.temperature).exp()  # [b m m]
        grouped = torch.einsum("gbm,gbl->bml", whose.float(), whose.float()) > 0
        any_of = whose.any(0)
        same = grouped & ~torch.eye(like.shape[-1], dtype=torch.bool, device=like.device)
        other = any_of[:, :, None] & any_of[:, None] & ~grouped
        apart = (like * other).sum(-1, keepdim=True)
        found = -(like / (like + apart)).log() * same
        return (found.sum((1, 2)) / same.sum((1, 2)).clamp(min=1)).sum()

    def _before(self, maps: Tensor, call: Call) -> Tensor | None:
        """The sum of the layers' maps in the step before, as far as this step has come: cosines see no scale."""
        if call.denoising is None:
            return None
        kept, forward, step = call.state.run, call.state.forward, call.denoising.number
        if step < kept.get("step", step) or ("now" in kept and kept["now"].shape != maps.shape):
            kept.clear()
        if step > kept.get("step", step):
            kept["before"] = kept["now"]
        mine = forward["maps"] - forward.get("summed", 0.0)
        kept["step"], kept["now"], forward["summed"] = step, mine.detach(), forward["maps"]
        if "before" not in kept:
            return None
        forward["earlier"] = found = forward.get("earlier", 0.0) + kept["before"]
        return found


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 12))
    method = CONFORM()
    x = model.get_input_embeddings()(ids).detach()  # stands for a noised picture
    with attach(model, method, roles={"first": ((2, 4),), "second": ((5, 7),)}) as run:
        for i in range(4):
            x.requires_grad_()
            with run.denoising(i, of=8):
                run(input_ids=ids, decoder_inputs_embeds=x)
            print(run.loss().item())
            x = method.moved(x, run.loss(), i, of=8)
