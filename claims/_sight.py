"""A small vision-language model, LLaVA's class, that is asked about pictures of two coloured things.

Where it learned, things mostly have the shape that goes with their colour, so that it may guess; where it is measured
they do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from claims._pictures import GRID, ID, PATCH, SIDE, WORDS, draw
from heedful import attach
from heedful.authoring import Call, Method, Site, Statistic, reads
from heedful.core.entry import Readings
from heedful.core.method import Part, Stack
from heedful.core.stats import Cat
from heedful.methods import AttentionKnockout

PATCHES = GRID**2
ASKED = ("left colour", "left shape", "right colour", "right shape", "ground")  # in the order of a picture's words
BEGIN, PICTURE = len(WORDS) + len(ASKED), len(WORDS) + len(ASKED) + 1  # tokens beside words and questions
IMAGE = ((1, 1 + PATCHES),)  # where the picture stands in a prompt, and, behind its class token, in the encoder
ROLES = {"image": IMAGE, "patches": IMAGE}
ENCODER, LANGUAGE = range(3), range(3, 7)  # layers, as a run numbers them
SHOWN = 1  # the encoder's layer whose tokens the language model reads; the last one serves the class token alone
ALIKE = 2 / 9  # in the training: how likely a picture stays for each thing whose colour and shape do not go together
FILE = Path(__file__).with_name("_sight.safetensors")
STEPS, BATCH, SEED, RATE = 2500, 24, 0, 2e-3  # of the training
KEPT = Path(__file__).with_name(".lab") / f"sight_{STEPS}.pt"  # a training under way


def fresh() -> Any:
    """The model, untrained: an encoder of three layers and a language model of four, a quarter of a million weights."""
    from transformers import AutoModelForImageTextToText, LlavaConfig

    blocks = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    text = dict(
        model_type="llama", vocab_size=PICTURE + 1, pad_token_id=0, bos_token_id=BEGIN, eos_token_id=0,
        num_hidden_layers=len(LANGUAGE), num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.1,
        **blocks,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", image_size=SIDE, patch_size=PATCH, projection_dim=64,
        num_hidden_layers=len(ENCODER), **blocks,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=PICTURE, image_seq_length=PATCHES,
        vision_feature_layer=SHOWN - len(ENCODER),
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config)


@cache
def model() -> Any:
    """The one that is shipped."""
    found = fresh()
    found.load_state_dict({name: x.float() for name, x in load_file(FILE).items()})
    return found.eval().requires_grad_(False)


def prompts(questions: Tensor) -> Tensor:
    """Token ids `[n 66]` that ask one question of each picture, by its number in `ASKED`."""
    n = len(questions)
    begin, picture = torch.full((n, 1), BEGIN), torch.full((n, PATCHES), PICTURE)
    return torch.cat([begin, picture, len(WORDS) + questions[:, None]], 1)


def noised(pictures: Tensor, noise: float, by: torch.Generator) -> Tensor:
    return pictures + noise * torch.randn(pictures.shape, generator=by)


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions about things in pictures, one of each."""

    inputs: dict[str, Tensor]  # what the model takes
    questions: Tensor  # [n], by their numbers in `ASKED`
    words: Tensor  # [n 5], what there is to say of the pictures
    things: Tensor  # [n 64], on which patches the thing stands that is asked for

    @property
    def answers(self) -> Tensor:
        """The right ones, `[n]`."""
        return self.words.gather(1, self.questions[:, None])[:, 0]


def asked(seed: int, count: int, noise: float) -> Asked:
    """Of pictures that no training saw. A question about a half has a thing there."""
    by = torch.Generator().manual_seed(1000 + seed)
    pictures, words, covered = draw(2 * count, by)
    questions = torch.randint(4, (2 * count,), generator=by)
    rows, side = torch.arange(2 * count), questions // 2
    there = covered[rows, side].flatten(1).any(1).nonzero().flatten()[:count]
    inputs = {"input_ids": prompts(questions[there]), "pixel_values": noised(pictures[there], noise, by)}
    return Asked(inputs, questions[there], words[there], patches(covered[rows, side][there]))


def guessed(seed: int, count: int, noise: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Questions about a thing's shape behind its colour, where these do not go together; the right shape, the usual."""
    by = torch.Generator().manual_seed(2000 + seed)
    pictures, words, _ = draw(4 * count, by)
    side = torch.randint(2, (4 * count,), generator=by)
    rows = torch.arange(4 * count)
    colour, shape = words[rows, 2 * side], words[rows, 2 * side + 1]
    common = colour - ID["red"] + ID["square"]
    chosen = ((colour != ID["nothing"]) & (common != shape)).nonzero().flatten()[:count]
    asks = torch.stack([colour, len(WORDS) + 2 * side + 1], 1)
    ids = torch.cat([prompts(2 * side), asks], 1)[chosen]
    pixels = noised(pictures[chosen], noise, by)
    return {"input_ids": ids, "pixel_values": pixels}, shape[chosen], common[chosen]


def patches(covered: Tensor) -> Tensor:
    """Which patches `[n 64]` a thing stands on, by its pixels `[n 16 16]`."""
    return F.max_pool2d(covered.float()[:, None], PATCH).flatten(1).bool()


def odd(words: Tensor) -> Tensor:
    """How many things of each picture `[n]` have not the shape that goes with their colour."""
    colour, shape = words[:, 0:4:2], words[:, 1:4:2]
    return ((colour != ID["nothing"]) & (colour - ID["red"] != shape - ID["square"])).sum(1)


def lesson(by: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noised pictures to learn from and their words: six things in ten have the shape of their colour."""
    pictures, words, _ = draw(6 * BATCH, by)
    chosen = (torch.rand(len(words), generator=by) < ALIKE ** odd(words)).nonzero().flatten()[:BATCH]
    return noised(pictures[chosen], 0.6 * float(torch.rand((), generator=by)), by), words[chosen]


def train(say: Callable[[str], None] = print) -> dict[str, Tensor]:
    """From nothing: five questions of each picture in some order, and the class token names all five words.

    A training that was broken off goes on where it last was kept.
    """
    torch.manual_seed(SEED)
    by, student = torch.Generator().manual_seed(SEED), fresh().train()
    names = nn.Linear(64, len(ASKED) * len(WORDS))
    weights = [*student.parameters(), *names.parameters()]
    optimiser = torch.optim.AdamW(weights, RATE, (0.9, 0.98), weight_decay=0.01)
    parts, begin = {"student": student, "names": names, "optimiser": optimiser}, 0
    if KEPT.exists():
        kept = torch.load(KEPT)
        begin = kept["step"]
        by.set_state(kept["by"])
        for name, part in parts.items():
            part.load_state_dict(kept[name])
    for step in range(begin, STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 200) * (0.51 + 0.49 * math.cos(math.pi * step / STEPS))
        pixels, words = lesson(by)
        order = torch.rand(words.shape, generator=by).argsort(1)
        answers = words.gather(1, order)
        ids = torch.cat([prompts(order[:, 0])[:, :-1], torch.stack([len(WORDS) + order, answers], -1).flatten(1)], 1)
        logits = student(input_ids=ids, pixel_values=pixels).logits[:, 1 + PATCHES :: 2]
        told = names(student.model.vision_tower(pixels).pooler_output).unflatten(-1, (len(ASKED), -1))
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        named = F.cross_entropy(told.flatten(0, 1), words.flatten())
        optimiser.zero_grad()
        (loss + 0.5 * named).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 250 == 249:
            say(f"{step + 1}: answers {loss.item():.3f}, class token {named.item():.3f}")
            state = {name: part.state_dict() for name, part in parts.items()}
            KEPT.parent.mkdir(exist_ok=True)
            torch.save({"step": step + 1, "by": by.get_state(), **state}, KEPT)
    return {name: x.half().contiguous() for name, x in student.state_dict().items()}


@torch.no_grad()
def told(inputs: dict[str, Tensor], method: Part | Stack | None = None) -> Tensor:
    """The logits `[n v]` of what is said next, as the model is or under a method."""
    if method is None:
        return model()(**inputs).logits[:, -1]
    with attach(model(), method, roles=ROLES) as run:
        return run(**inputs).logits[:, -1]


class _Given(Method):
    """What the last token of each prompt gives to the picture, heads averaged, in the language model's layers."""

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Statistic | None:
        if not call.mask.causal:
            return None
        return Cat.of(f"{call.rows.start:09d}", weights[:, :, -1, 1 : 1 + PATCHES].mean(1))

    def answer(self, readings: Readings) -> Tensor:
        return torch.stack([stat.value[-1] for stat in readings.values()], 1)


@torch.no_grad()
def looks(inputs: dict[str, Tensor]) -> Tensor:
    """Where the last tokens of the prompts look, `[n layers 64]`."""
    with attach(model(), _Given()) as run:
        run(**inputs)
        found: Tensor = run[_Given()]
    return found


@torch.no_grad()
def hiding(inputs: dict[str, Tensor], places: list[tuple[int, ...]]) -> Tensor:
    """The logits `[n v]` of what is said next, where the language model does not see some tokens of each prompt."""
    roles = [{"hidden": tuple((place, place + 1) for place in each)} for each in places]
    with attach(model(), AttentionKnockout("hidden").on(layers=LANGUAGE), roles=roles) as run:
        return run(**inputs).logits[:, -1]


def record() -> dict[str, str]:
    """What is written beside the weights: the training's settings, and how often the model is right."""
    with safe_open(FILE, "pt") as found:
        return dict(found.metadata())


def right(noise: float, seed: int = -1, count: int = 400) -> float:
    item = asked(seed, count, noise)
    return share_right(told(item.inputs), item.answers)


def share_right(logits: Tensor, answers: Tensor) -> float:
    return float((logits.argmax(-1) == answers).double().mean())


def guesses(ways: dict[str, Tensor], answers: Tensor, usual: Tensor) -> dict[str, float]:
    """How often in a hundred the likeliest shape, by each way's logits `[n v]`, is the right one, and the usual one."""
    found = {}
    for name, each in ways.items():
        said = each[:, ID["square"] : ID["square"] + 4].argmax(-1) + ID["square"]
        found[f"right, {name}"] = 100 * float((said == answers).double().mean())
        found[f"the usual, {name}"] = 100 * float((said == usual).double().mean())
    return found


def log_probability(logits: Tensor, answers: Tensor) -> float:
    """The mean, over questions, of that of the right answer."""
    return float(logits.double().log_softmax(-1).gather(1, answers[:, None]).mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_file(train(), FILE)
    shares = {f"right, noise {noise:g}": f"{right(noise):.3f}" for noise in (0.0, 0.5, 1.0)}
    print(shares)
    save_file(load_file(FILE), FILE, {"steps": str(STEPS), "batch": str(BATCH), "seed": str(SEED), **shares})
    KEPT.unlink()
