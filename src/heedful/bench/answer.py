"""A model's answers to an item, teacher-forced token by token through its own cache."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from heedful.shown import Writing
from heedful.tasks.task import Item, Sheet
from heedful.text_models import TextModel


@torch.no_grad()
def answer(text_model: TextModel, item: Item) -> Sheet:
    """What a text model makes of one item: how likely each option is to it, or what the prompt's own tokens cost it."""
    text_model.shown = item.shown
    if item.shown.looks:
        text_model.read(item.prompt, item.cut)
        looks, boxes = text_model.looked()
        return Sheet((), (), torch.empty(0), looks=looks.cpu(), boxes=boxes.cpu())
    if not item.options:
        logits = text_model.read(item.prompt, item.cut, every=True)
        asked = torch.tensor(item.prompt.tokens[len(item.prompt) + 1 - len(logits) :], device=logits.device)
        losses = torch.nn.functional.cross_entropy(logits[:-1].float(), asked, reduction="none")
        return Sheet((), tuple((logits[:-1].argmax(-1) == asked).tolist()), losses)
    last = text_model.read(item.prompt, item.cut)[-1]
    likely, greedy = [], []
    said: tuple[int, ...] = ()
    if item.writes is not None:
        with text_model.branch():
            said = write(text_model, last, item.writes)
    for number, option in enumerate(item.options):
        with text_model.branch() if len(option) > 1 else nullcontext():
            found, best = follow(text_model, last, option)
        likely.append(found)
        if number == 0:
            greedy = best
    return Sheet(tuple(likely), tuple(greedy), torch.empty(0), said)


def write(text_model: TextModel, logits: Tensor, how: Writing) -> tuple[int, ...]:
    """What the model writes by itself, without what ends it."""
    said: list[int] = []
    while len(said) < how.most:
        if said:
            logits = text_model.go_on(said[-1])
        if (token := how.next(logits, first=not said)) in how.ends:
            break
        said.append(token)
    return tuple(said)


def follow(text_model: TextModel, logits: Tensor, option: tuple[int, ...]) -> tuple[Tensor, list[bool]]:
    """The log-probability of each token of a continuation, and whether it was the likeliest."""
    found, best = [], []
    for place, token in enumerate(option):
        if place:
            logits = text_model.go_on(option[place - 1])
        found.append(logits.float().log_softmax(-1)[token])
        best.append(int(logits.argmax()) == token)
    return torch.stack(found), best
