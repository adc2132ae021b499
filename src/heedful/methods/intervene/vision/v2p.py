"""weight (KL(t || a) + suppression * a outside the box), a a query's attention on patches, t a Gaussian in the box."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    Method,
    NonNegativeFloat,
    Paper,
    PositiveFloat,
    RoleName,
    Site,
    penalises,
)
from heedful.core.errors import InactiveWarning

TINY = 1e-8  # of an attention whose logarithm would be infinite; as in the authors' code


class V2P(Method):
    """Trains a model to look at the middle of the box that is asked for, and away from all that lies around it.

    Attach it with roles that name the box's patches, `{"target": spans}`, for each text its own, and train on labels:
    the penalty joins the model's loss. `.on(layers=...)` says in which layers.
    """

    paper = Paper(
        "P006",
        "V2P: Visual Attention Calibration for GUI Grounding via Background Suppression and Center Peaking",
        "Jikai Chen, Long Chen, Dong Wang, Qinglin Su, Zhixuan Chu, Bingguang Hao, Leilei Gan, Chenyi Zhuang, "
        "Jinjie Gu",
        2026,
        "2508.13634",
        differs=(
            "It is the loss alone, on the attention of a model's own layers, heads averaged; the authors have a "
            "pointer head behind the last layer, with a layer of self-attention among patches.",
            "Attention on patches is divided by its sum, since the authors' softmax is over patches alone.",
            "A box has 4.1325 standard deviations to a side, as by default in the authors' code; the scripts beside it "
            "train with 1.",
            "A box is one of whole patches, the least around those that are named; the authors cut patches at the "
            "box's pixels.",
        ),
        also=(
            Paper(
                "P018",
                "V2P: From Background Suppression to Center Peaking for Robust GUI Grounding Task",
                "Jikai Chen, Long Chen, Dong Wang, Leilei Gan, Chenyi Zhuang, Jinjie Gu",
                2025,
                "2508.13634v1",
                differs=("As above, of which it is an earlier version.",),
            ),
        ),
    )
    subjects = ("image",)
    whole_map = True
    weight: NonNegativeFloat = 1.0  # beside the model's own loss; the authors: 1
    suppression: NonNegativeFloat = 1.0  # of attention outside the box; the authors: 1
    # a box's side in standard deviations of the Gaussian; the authors: 4.1325, 96 % of it inside
    peak: PositiveFloat = 4.1325
    target: RoleName = "target"  # the patches of the box
    asking: str = ""  # the role of the queries; "": the last token of each text
    patches: RoleName = "patches"  # the picture, with its grid

    @classmethod
    def neutral(cls) -> V2P:
        return cls(0.0)

    @classmethod
    def example(cls) -> V2P:
        return cls(target="marked")

    def idle(self, call: Call) -> bool:
        return self.weight == 0

    @penalises(Site.PATTERN)
    def calibrate(self, pattern: Tensor, call: Call) -> Tensor:
        place = call.coordinates(self.patches)[1][:, 0].to(pattern.dtype)  # [b|1 k 2]
        picture = place[..., 0] >= 0
        marked = picture & call.marked(self.target)[:, 0]
        if not bool(marked.any()):
            rule = f"none of {self.target!r} is a patch of {self.patches!r} in any text, and there is nothing to learn"
            warnings.warn(f"{self!r}, layer {call.layer}: {rule}", InactiveWarning, stacklevel=2)
        box, wanted = self._box(place, marked)
        looks = pattern.mean(1) * picture[:, None]  # [b r k]
        looks = looks / looks.sum(-1, keepdim=True).clamp(min=TINY)
        logs = looks.clamp(min=TINY).log()
        apart = (torch.xlogy(wanted, wanted)[:, None] - wanted[:, None] * logs).sum(-1)
        outside = (looks * ~box[:, None]).sum(-1)
        counts = self._asking(call) & marked.any(-1, keepdim=True)
        loss = (apart + self.suppression * outside) * counts
        return self.weight * loss.sum() / counts.expand_as(loss).sum().clamp(min=1)

    def _asking(self, call: Call) -> Tensor:
        """Which queries `[b|1 r]` are judged."""
        if self.asking:
            return (call.is_text & call.marked_queries(self.asking))[:, 0]
        return torch.arange(len(call.queries), device=call.last.device) == call.last

    def _box(self, place: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Which patches `[b|1 k]` lie in the box, and the share of the Gaussian that each is to have."""
        far = int(place.max()) + 1
        low = place.where(marked[..., None], far).amin(-2, keepdim=True)  # [b|1 1 2]
        high = place.where(marked[..., None], -1).amax(-2, keepdim=True) + 1
        box = ((place >= low) & (place < high)).all(-1)
        side, middle = (high - low).clamp(min=1), (low + high) / 2
        below, above = (torch.special.ndtr((edge - middle) * self.peak / side) for edge in (place, place + 1))
        share = self.shares((above - below).prod(-1)) * box
        return box, share / share.sum(-1, keepdim=True).clamp(min=TINY)

    def shares(self, gaussian: Tensor) -> Tensor:
        """What each patch is to have of attention, up to a factor, by what the Gaussian has there."""
        return gaussian


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32).requires_grad_(True)
    inputs = models.tiny_inputs(model)
    with attach(model, V2P(), roles={"target": ((5, 7), (9, 11))}) as run:
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(5):
            optimiser.zero_grad()
            run(**inputs)
            run.loss().backward()
            optimiser.step()
            print(run.loss().item())
