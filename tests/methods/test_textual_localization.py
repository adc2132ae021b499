"""Textual localization: the distance of a word's levelled map from a mask by loops, and what it gives back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, InactiveWarning
from heedful.methods.intervene.diffusion.textual_localization import TextualLocalization

from .painter import PLACES, Painter, check_loss, inputs, maps

ROLES = {"word": ((1, 2), (3, 4)), "mask": ((0, 3), (4, 7)), "one": ((5, 6),), "spot": ((7, 9),)}
MASK = [0, 1, 2, 4, 5, 6]


def _loss(weights: Tensor, words: list[int], mask: list[int], inside: float) -> Tensor:
    total = torch.zeros((), dtype=weights.dtype)
    for one in weights:
        for word in words:
            image = one[:, word]
            low, high = min(image), max(image)
            for place in range(PLACES):
                level = (image[place] - low) / (high - low)
                far = (level - 1) ** 2 * inside if place in mask else level**2
                total = total + far / PLACES
    return total / (len(words) * len(weights))


CASES = (
    (TextualLocalization(), [1, 3], MASK),
    (TextualLocalization(inside=0.0), [1, 3], MASK),
    (TextualLocalization(0.5, "one", "spot", 0.3), [5], [7, 8]),
)


@pytest.mark.parametrize(("method", "words", "mask"), CASES, ids=repr)
def test_the_loss_and_what_it_gives_back(method: TextualLocalization, words: list[int], mask: list[int]) -> None:
    model, given = Painter().requires_grad_(), inputs(3)
    want = method.weight * _loss(sum(maps(model, **given)) / 2, words, mask, method.inside)
    check_loss(model, method, want, ROLES, given)


def test_each_text_has_words_and_a_mask_of_its_own() -> None:
    model, given = Painter(), inputs()
    mean = sum(maps(model, **given)) / 2
    texts = (([0], [0, 1]), ([2, 5], [3, 4, 5]))
    # the mean is over words, wherever they stand
    want = sum(len(words) * _loss(mean[i : i + 1], words, mask, 1.0) for i, (words, mask) in enumerate(texts)) / 3
    roles = [{"word": ((0, 1),), "mask": ((0, 2),)}, {"word": ((2, 3), (5, 6)), "mask": ((3, 6),)}]
    with attach(model, TextualLocalization(), roles=roles, inputs=given) as run:
        run(**given)
        assert close(run.loss(), torch.as_tensor(want).float())


def test_no_word_and_an_even_map_are_no_loss_that_is_no_number() -> None:
    model, given = Painter(), inputs()
    told, roles = pytest.warns(InactiveWarning, match="its penalty is 0"), {"word": (), "mask": ((0, 2),)}
    with told, attach(model, TextualLocalization(), roles=roles, inputs=given) as run:
        run(**given)
        assert float(run.loss()) == 0
    given["context"][:] = 0  # so that all words are alike, and every map is even
    with attach(model, TextualLocalization(), roles=ROLES, inputs=given) as run:
        run(**given)
        assert close(run.loss(), torch.tensor(len(MASK) / PLACES))


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"role": ""}, "TextualLocalization.role = '': must name a role"),
        ({"mask": ""}, "TextualLocalization.mask = '': must name a role"),
        ({"weight": -1.0}, "TextualLocalization.weight = -1.0: must be 0 or more"),
        ({"inside": float("inf")}, "TextualLocalization.inside = inf: must be 0 or more"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            TextualLocalization(**settings)
    assert TextualLocalization(0.0, inside=0.0).weight == 0
