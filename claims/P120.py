"""Select and pack: does a gate that was shown what is wanted leave more of it than the class token's attention?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._merged import merged
from claims._scenes import model, scenes
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods import SelectAndPack

LAYER, SHOWN = 3, 3


@torch.no_grad()
def _streams(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Behind the layer, and before it, `[b n e]`."""
    states = model()(pixel_values=pixels, output_hidden_states=True).hidden_states
    return states[LAYER + 1], states[LAYER]


@torch.no_grad()
def _looked_at(before: Tensor) -> Tensor:
    """What the class token gives each patch in the layer, the mean over heads, `[b p]`."""
    block = model().encoder.layer[LAYER] if hasattr(model(), "encoder") else model().layers[LAYER]
    part, x = block.attention, block.norm1(before)
    heads = model().config.num_attention_heads
    q, k = (m(x).unflatten(-1, (heads, -1)).transpose(1, 2) for m in (part.q_proj, part.k_proj))
    weights: Tensor = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = torch.Generator().manual_seed(seed)
    pixels, covered = scenes(draw, SHOWN)
    method = fit(SelectAndPack(LAYER), model(), [{"pixel_values": pixels, "selected": covered}])
    pixels, covered = scenes(draw, SHOWN)
    behind, before = _streams(pixels)
    stays = method.gated(behind)[:, 1:] >= method.least

    def best(score: Tensor) -> Tensor:
        """As many of each picture as the gate selects."""
        return score.argsort(dim=1, descending=True).argsort(1) < stays.sum(1, keepdim=True)

    def found(chosen: Tensor) -> float:
        return float((chosen & covered).sum() / covered.sum())

    numbers = {"gate": found(stays), "class token's attention": found(best(_looked_at(before)))}
    numbers["longest streams"] = found(best(behind[:, 1:].norm(dim=-1)))
    numbers["share of patches"], numbers["share covered"] = float(stays.float().mean()), float(covered.float().mean())
    numbers["time"] = merged(1000 + seed, {"gate": method})["time, gate"]
    return numbers["gate"] - numbers["class token's attention"], numbers


CLAIM = Claim(
    key="P120",
    method="SelectAndPack",
    says="A linear gate that learns from labelled patches selects what is wanted, of each image as much as there is.",
    paper_number="0.6 mAP more in object detection with 16.4 % fewer operations (abstract)",
    setup=f"DINOv2-S/14 as it is; {SHOWN} pictures with a piece of another picture, in which patches are labelled by "
    f"whether it covers them, fit the gate behind layer {LAYER} of 12, {SHOWN} others are selected from. Share of the "
    "covered patches that stay, against as many of each picture that the class token gives most in that layer. "
    "Details: against the longest streams; how many are selected and covered; and the processor's time, as a share "
    "of the unedited model's. No detector is trained.",
    effect="share of covered patches that stay, above that by the class token's attention",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
