"""ReAtCo: the loss of a word's map within and without its box by loops, and a step down its slope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.diffusion.re_at_co import ReAtCo

from .painter import GRID, PLACES, WORDS, Painter, inputs, maps, shared, smoothed

ROLES = {"thing": ((1, 2), (3, 4)), "box": ((0, 3), (4, 7)), "text": ((1, 6),), "other": ((0, 2),), "corner": ((0, 1),)}
BOX = [0, 1, 2, 4, 5, 6]
ALL = list(range(WORDS))


def _highest(image: Tensor, places: list[int], share: float) -> Tensor:
    count = max(1, int(share * len(places)))
    return (
        sum(sorted((image[place] for place in places), key=lambda x: x.detach().item(), reverse=True)[:count]) / count
    )


def _loss(weights: Tensor, words: list[int], text: list[int], box: list[int], method: ReAtCo) -> Tensor:
    total = torch.zeros((), dtype=weights.dtype)
    outside = [place for place in range(PLACES) if place not in box]
    for one in weights:
        won = shared(one, text, method.sharpness)
        for word in words:
            image = smoothed(won[word]) if method.grid else won[word]
            total = total + 1 - _highest(image, box, method.share) + _highest(image, outside, method.share)
    return total


CASES = (
    (ReAtCo(), [1, 3], ALL, BOX),
    (ReAtCo(share=0.5, sharpness=4.0, grid=GRID), [1, 3], ALL, BOX),
    (ReAtCo(share=1.0, sharpness=3.0, text="text"), [1, 3], [1, 2, 3, 4, 5], BOX),
    (ReAtCo(share=0.4, sharpness=3.0, text="text", role="other"), [1], [1, 2, 3, 4, 5], BOX),
    (ReAtCo(share=0.4, sharpness=3.0, box="corner"), [1, 3], ALL, [0]),
)


@pytest.mark.parametrize(("method", "words", "text", "box"), CASES, ids=repr)
def test_the_loss_and_its_slope(method: ReAtCo, words: list[int], text: list[int], box: list[int]) -> None:
    model, given = Painter(), inputs(3)
    x = given["x"].clone().requires_grad_()
    want = _loss(sum(maps(model, x, given["context"])) / 2, words, text, box, method)
    (slope,) = torch.autograd.grad(want, x)
    with attach(model, method, roles=ROLES, inputs=given) as run:
        run(x=x, context=given["context"])
        assert close(run.loss(), want.detach().float())
        assert close(method.moved(x, run.loss(), 0, 5).float(), (x - 20.0 * slope).detach().float())


def test_each_text_has_a_box_of_its_own() -> None:
    model, given, method = Painter(), inputs(), ReAtCo(share=0.5, sharpness=5.0)
    mean = sum(maps(model, **given)) / 2
    boxes = ([0, 1], [3, 4, 5, 6, 7, 8])
    want = sum(_loss(mean[i : i + 1], [2], ALL, box, method) for i, box in enumerate(boxes))
    roles = [{"thing": ((2, 3),), "box": ((box[0], box[-1] + 1),)} for box in boxes]
    with attach(model, method, roles=roles, inputs=given) as run:
        run(**given)
        assert close(run.loss(), torch.as_tensor(want).float())


def test_padding_is_neither_in_a_box_nor_outside() -> None:
    """The last two of six tokens are padding; places of a picture never are."""
    model = models.tiny("bart", attn_implementation="eager")
    ids = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    method = ReAtCo(share=0.5, sharpness=5.0)
    roles = {"thing": ((2, 3),), "box": ((0, 1), (3, 5))}
    with torch.no_grad(), attach(model, method, roles=roles) as run:
        found = run(input_ids=ids, decoder_input_ids=ids, decoder_attention_mask=mask, output_attentions=True)
        weights = sum(x.mean(1) for x in found.cross_attentions) / len(found.cross_attentions)
        image = (5.0 * weights[0]).softmax(-1)[:, 2]
        want = 1 - _highest(image, [0, 3], 0.5) + _highest(image, [1, 2], 0.5)
        assert close_model(run.loss(), want)


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"role": ""}, "ReAtCo.role = '': must name a role"),
        ({"box": ""}, "ReAtCo.box = '': must name a role"),
        ({"sharpness": 0.0}, "ReAtCo.sharpness = 0.0: must be above 0"),
        ({"sharpness": float("inf")}, "ReAtCo.sharpness = inf: must be above 0 and finite"),
        ({"share": 0.0}, "ReAtCo.share = 0.0: must be above 0, and 1 at most"),
        ({"share": 1.5}, "ReAtCo.share = 1.5: must be above 0, and 1 at most"),
        ({"until": 2.0}, "ReAtCo.until = 2.0: must lie from 0 to 1"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            ReAtCo(**settings)
