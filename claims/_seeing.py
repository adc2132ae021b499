"""A language model that is shown pictures: SmolLM2 behind the small encoder, joined by a map that is solved for.

It is a LLaVA whose projector is one ridge regression from patches to the embeddings of words for what stands on them.
Nothing teaches the language model to see, so it has what it learned from text: sinks, and words that it likes to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from claims._loaded import default
from claims._pictures import COLOURS, ID, PATCH, draw
from claims._sight import ENCODER, PATCHES, SHOWN, noised
from claims._sight import model as sight
from heedful import attach
from heedful.core.method import Part, Stack

NAMES = (*COLOURS, "black", "gray", "white")  # of colours, and of the grounds from dark to light
FITTED, NOISE, RIDGE = 400, 0.3, 1.0
LANGUAGE = range(len(ENCODER), len(ENCODER) + 30)  # layers of the language model, as a run numbers them
PICTURE = 6  # a token of its own kind in SmolLM2's vocabulary, which no text has
BEFORE = "Here are the colours of a picture, patch by patch:"
BEHIND = ".\nThe colours of the things in it are"
SEEN = (
    "SmolLM2-135M behind the small encoder of 16 x 16 pictures, joined by a ridge regression from patches to the "
    "embeddings of the words for what stands on them, fitted anew for each seed"
)


@cache
def name_ids() -> Tensor:
    """The tokens of the names."""
    return torch.tensor([default().tokenizer(f" {name}").input_ids[0] for name in NAMES])


@torch.no_grad()
def projection(seed: int) -> Tensor:
    """From a patch as the encoder shows it, and 1, to the embedding of the name of what stands there, `[65 576]`."""
    by = torch.Generator().manual_seed(3000 + seed)
    pictures, words, covered = draw(FITTED, by)
    read = sight().model.vision_tower(noised(pictures, NOISE, by), output_hidden_states=True).hidden_states
    what = (len(COLOURS) + words[:, 4] - ID["dark"])[:, None].expand(-1, PATCHES)
    for side in (0, 1):
        on = F.avg_pool2d(covered[:, side, None].float(), PATCH).flatten(1) >= 0.5
        what = torch.where(on, (words[:, 2 * side] - ID["red"])[:, None], what)
    shown = F.pad(read[SHOWN + 1][:, 1:].flatten(0, 1), (0, 1), value=1.0)
    wanted = default().model.get_input_embeddings().weight[name_ids()][what.flatten()]
    return torch.linalg.solve(shown.T @ shown + RIDGE * torch.eye(shown.shape[1]), shown.T @ wanted)


@torch.no_grad()
def joined(seed: int) -> Any:
    """The whole model."""
    from transformers import AutoModelForImageTextToText, LlavaConfig

    language, eyes = default().model, sight()
    config = LlavaConfig(
        text_config=language.config, vision_config=eyes.config.vision_config, image_token_index=PICTURE,
        image_seq_length=PATCHES, vision_feature_layer=SHOWN - len(ENCODER), projector_hidden_act="linear",
    )  # fmt: skip
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    whole.model.vision_tower, whole.model.language_model = eyes.model.vision_tower, language.model
    whole.lm_head = language.lm_head
    found, joint = projection(seed), whole.model.multi_modal_projector.to_empty(device="cpu")
    wide = joint.linear_1.in_features
    joint.linear_1.weight.zero_()[:wide] = torch.eye(wide)
    joint.linear_1.bias.zero_()
    joint.linear_2.weight.zero_()[:, :wide] = found[:wide].T
    joint.linear_2.bias[:] = found[wide]
    return whole.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures of two things in two colours, in a prompt."""

    inputs: dict[str, Tensor]  # what the model takes
    roles: dict[str, tuple[tuple[int, int], ...]]  # the image's tokens, the prompt's text, and the encoder's patches
    there: Tensor  # [n 4], which colours the pictures have


def shown(seed: int, count: int, before: str, behind: str) -> Shown:
    """Of pictures that no fit saw."""
    by = torch.Generator().manual_seed(4000 + seed)
    pictures, words, _ = draw(8 * count, by)
    left, right = words[:, 0], words[:, 2]
    two = ((left != right) & (left != ID["nothing"]) & (right != ID["nothing"])).nonzero().flatten()[:count]
    tokenizer = default().tokenizer
    first, last = (tokenizer(text).input_ids if text else [] for text in (before, behind))
    ids = torch.tensor([first + [PICTURE] * PATCHES + last]).expand(count, -1)
    start, stop = len(first), len(first) + PATCHES
    text = tuple(span for span in ((0, start), (stop, ids.shape[1])) if span[0] < span[1])
    roles = {"image": ((start, stop),), "text": text, "patches": ((1, 1 + PATCHES),)}
    there = F.one_hot(words[two][:, [0, 2]] - ID["red"], len(COLOURS)).any(1)
    return Shown({"input_ids": ids, "pixel_values": noised(pictures[two], NOISE, by)}, roles, there)


def told(model: Any, item: Shown, what: Part | Stack | None = None) -> Tensor:
    """The logits `[n 4]` of each colour's name after the prompt, as the model is or under a method."""
    with torch.no_grad(), attach(model, what or Stack(), roles=item.roles) as run:
        found: Tensor = run(**item.inputs, logits_to_keep=1).logits[:, -1, name_ids()[: len(COLOURS)]]
    return found


def in_picture(logits: Tensor, there: Tensor) -> dict[str, float]:
    """How likely colours `[n 4]` are, among all four, that are in the picture, and how often the likeliest is."""
    sure = logits.double().log_softmax(-1).masked_fill(~there, -torch.inf).logsumexp(-1)
    first = there.gather(1, logits.argmax(-1, keepdim=True))
    return {"log-probability": float(sure.mean()), "first": 100 * float(first.double().mean())}
