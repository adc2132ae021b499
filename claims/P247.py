"""Add-it: does what is beside a new thing stay where it stood in the scene?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._guided import STEPS, plain, prompts, recorded, under
from claims._pictures import COLOURS, HALF, ID, SHAPES, denoiser, judge, off_ground
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods import AddIt

PICTURES = 12


def _another(words: Tensor, by: torch.Generator) -> Tensor:
    """The same words but for the thing on the left, which has another colour and another shape."""
    other = words.clone()
    for place, (name, count) in enumerate((("red", len(COLOURS)), ("square", len(SHAPES)))):
        turn = 1 + torch.randint(count - 1, (len(words),), generator=by)
        other[:, place] = ID[name] + (words[:, place] - ID[name] + turn) % count
    return other


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    by = torch.Generator().manual_seed(400 + seed)
    model = denoiser()
    words, noise = prompts(PICTURES, by)
    other, fresh = _another(words, by), torch.randn(noise.shape, generator=by)
    context = model.read(other)
    source, forwards = recorded(words, noise)
    _, elsewhere = recorded(words.roll(1, 0), noise.roll(1, 0))
    drawn = {
        "the scene seen": under(fit(AddIt(), model, forwards), fresh, context),
        "balanced": under(fit(AddIt(scale=None), model, forwards), fresh, context),
        "words alone": plain(fresh, context),
        "another scene seen": under(fit(AddIt(), model, elsewhere), fresh, context),
    }
    numbers: dict[str, float] = {}
    before = off_ground(source, words)[..., HALF:].flatten(1)
    for name, pictures in drawn.items():
        after = off_ground(pictures, other)[..., HALF:].flatten(1)
        shared = (before & after).sum(1) / (before | after).sum(1).clamp(min=1)
        numbers[f"overlap, {name}"] = float(shared.mean())
        numbers[f"new thing, {name}"] = float((judge(pictures)[:, :2] == other[:, :2]).float().mean())
    best = max(numbers["overlap, words alone"], numbers["overlap, another scene seen"])
    return numbers["overlap, the scene seen"] - best, numbers


CLAIM = Claim(
    key="P247",
    method="AddIt",
    says="A new picture that sees a scene's keys and values beside its own keeps the scene where nothing was added.",
    paper_number="people prefer it in over 80 % of comparisons",
    setup=f"A text-to-image transformer of 0.2M parameters on 16 x 16 pictures of two things instead of FLUX; "
    f"{PICTURES} scenes a seed in {STEPS} steps, and pictures from other noise whose words name another thing on the "
    "left. Against words alone and against seeing another scene. Beside it how many words of the new thing come true, "
    "and the same with a scale that balances both pictures.",
    effect="intersection over union of the thing on the right in scene and picture, above that of the better control",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
