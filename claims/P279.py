"""ReAtCo: does a thing come to stand in the box that its words' maps are drawn into?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._guided import LAID, STEPS, guided, plain, prompts
from claims._pictures import GRID, GROUNDS, HALF, ID, denoiser, right
from claims.ledger import Claim, run
from heedful.methods import ReAtCo

PICTURES = 24


def _box(low: bool) -> tuple[tuple[int, int], ...]:
    """The upper or the lower half of the left half, as spans of places."""
    rows = range(GRID // 2, GRID) if low else range(GRID // 2)
    return tuple((row * GRID, row * GRID + GRID // 2) for row in rows)


def _inside(pictures: Tensor, words: Tensor, low: Tensor) -> float:
    """The share, in the box, of all that is not ground in the left half."""
    light = torch.tensor(list(GROUNDS.values()))[words[:, 4] - ID["dark"]] * 2 - 1
    thing = ((pictures[..., :HALF] - light[:, None, None, None]).abs().mean(1) - 0.2).clamp(min=0).sum(-1)
    upper = thing[:, :HALF].sum(-1) / thing.sum(-1)
    return float(torch.where(low, 1 - upper, upper).mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    by = torch.Generator().manual_seed(100 + seed)
    words, noise = prompts(PICTURES, by)
    context = denoiser().read(words)
    low = torch.rand(PICTURES, generator=by) < 0.5
    here, there = (
        [{"thing": ((0, 2),), "box": _box(one)} for one in boxes] for boxes in (low.tolist(), (~low).tolist())
    )
    method = ReAtCo(grid=LAID)
    drawn = {
        "plain": plain(noise, context),
        "guided": guided(method, noise, context, here),
        "moved anywhere": guided(method, noise, context, here, by),
        "guided to the other box": guided(method, noise, context, there),
    }
    numbers = {f"inside, {name}": _inside(pictures, words, low) for name, pictures in drawn.items()}
    for name in ("plain", "guided"):
        numbers |= {f"{concept}s right, {name}": share for concept, share in right(drawn[name], words).items()}
    return numbers["inside, guided"] - max(numbers["inside, plain"], numbers["inside, moved anywhere"]), numbers


CLAIM = Claim(
    key="P279",
    method="ReAtCo",
    says="A loss that draws the maps of a thing's words into a box makes the thing stand there.",
    paper_number="none in the abstract; its tables judge videos by CLIP, by people, and by spatial relations",
    setup=f"A text-to-image transformer of 0.2M parameters on 16 x 16 pictures of two things instead of a video model; "
    f"{PICTURES} pictures a seed, whose thing on the left is to stand in the upper half or in the lower, drawn by lot, "
    f"{STEPS} steps, one move in each of the first half of them; rate, sharpness and share are the authors'. Against "
    "no moves, and moves of the same length in random directions. Beside it the other box, and how many words of the "
    "prompt the pictures still show.",
    effect="share of the thing in its box, above the better of both controls",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
