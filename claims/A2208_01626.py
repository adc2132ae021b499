"""Prompt-to-prompt: does a thing stay where it is if its word changes and the maps do not?"""

from __future__ import annotations

import torch

from claims._guided import STEPS, plain, prompts, recorded, under
from claims._pictures import COLOURS, HALF, ID, denoiser, judge, off_ground
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods import PromptToPrompt

PICTURES = 12


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    by = torch.Generator().manual_seed(100 + seed)
    model = denoiser()
    words, noise = prompts(PICTURES, by)
    turn = 1 + torch.randint(len(COLOURS) - 1, (PICTURES,), generator=by)
    other = words.clone()
    other[:, 0] = ID["red"] + (words[:, 0] - ID["red"] + turn) % len(COLOURS)
    source, forwards = recorded(words, noise)
    context = model.read(other)
    fitted = fit(PromptToPrompt(), model, forwards)
    drawn = {
        "maps of the first": under(fitted, noise, context),
        "other words alone": plain(noise, context),
        "even maps": under(PromptToPrompt(), noise, context),
    }
    numbers: dict[str, float] = {}
    before = off_ground(source, words)[..., :HALF].flatten(1)
    for name, pictures in drawn.items():
        after = off_ground(pictures, other)[..., :HALF].flatten(1)
        shared = (before & after).sum(1) / (before | after).sum(1).clamp(min=1)
        numbers[f"overlap, {name}"] = float(shared.mean())
        numbers[f"in the new colour, {name}"] = float((judge(pictures)[:, 0] == other[:, 0]).float().mean())
    best = max(numbers["overlap, other words alone"], numbers["overlap, even maps"])
    return numbers["overlap, maps of the first"] - best, numbers


CLAIM = Claim(
    key="2208.01626",
    method="PromptToPrompt",
    says="With another picture's maps, a picture of changed words has its layout.",
    paper_number="none: pictures alone",
    setup=f"A text-to-image transformer of 0.2M parameters on 16 x 16 pictures of two things instead of Imagen; "
    f"{PICTURES} pictures a seed, made twice from the same noise in {STEPS} steps, the second time with another colour "
    "for the thing on the left; shares of steps are the authors'. Against the changed words alone, and even maps. "
    "Beside it how often the thing has its new colour.",
    effect="intersection over union of the thing's places in both pictures, above that of the better control",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
