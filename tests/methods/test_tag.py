"""TAG against maps that are chosen and added up head by head, forward by forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import TAG
from heedful.methods.explain.tag import Grounding

IMAGE, ASKED = (2, 3, 4, 6, 7), (8, 9, 12)
ROLES = {"image": ((2, 5), (6, 8)), "question": ((8, 10), (12, 13))}


def ids(n: int = 14, seed: int = 0) -> Tensor:
    return torch.randint(3, 127, (2, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")


def by_hand(maps: Any, text: int, asked: tuple[int, ...], image: tuple[int, ...], heads: int) -> list[float]:
    """Of one text, from the maps `[b h n n]` of all layers."""
    total = [0.0] * len(image)
    for row in asked:
        each = [[float(head[row, j]) for j in image] for layer in maps for head in layer[text]]
        best = sorted(each, key=lambda given: -sum(given))[:heads]
        for given in best:
            total = [a + b / len(best) / len(asked) for a, b in zip(total, given, strict=True)]
    return total


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 3, 10, 40])
@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_heads_are_chosen_for_each_token(model: Any, heads: int, backend: str) -> None:
    method = TAG(heads)
    with heedful.attach(model, method, roles=ROLES, backend=backend) as run:
        run(input_ids=ids())
        (found,) = run[method]
    maps = model(input_ids=ids(), output_attentions=True).attentions
    for text in range(2):
        wanted = torch.tensor(by_hand(maps, text, ASKED, IMAGE, heads))
        assert close_model(found.map[text].float(), wanted)
        assert found.place[text] == wanted.argmax()


@torch.no_grad()
def test_each_forward_has_its_own(model: Any) -> None:
    method, text, other = TAG(4), ids(), ids(seed=1)
    with heedful.attach(model, method, roles=ROLES) as run:
        cache = cache_of(run(input_ids=text[:, :7], use_cache=True))
        cache = cache_of(run(input_ids=text[:, 7:9], **{CACHE: cache}))
        cache = cache_of(run(input_ids=text[:, 9:11], **{CACHE: cache}))
        run(input_ids=text[:, 11:12], **{CACHE: cache})
        run(input_ids=other)
        found = run[method]
    assert len(found) == 3
    maps, second = (model(input_ids=x, output_attentions=True).attentions for x in (text, other))
    for each, of, asked in zip(found, (maps, maps, second), ((8,), (9,), ASKED), strict=True):
        assert close_model(each.map[1].float(), torch.tensor(by_hand(of, 1, asked, IMAGE, 4)))


@torch.no_grad()
def test_texts_of_unlike_length_and_questions_of_their_own(model: Any) -> None:
    short, long = ids(11)[:1], ids(14, seed=3)[:1]
    text = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    seen = (torch.arange(14) >= torch.tensor([[3], [0]])).long()
    roles = [{"image": ((1, 4),), "question": ((8, 10),)}, {"image": ((2, 6),), "question": ((9, 12),)}]
    with heedful.attach(model, TAG(2), roles=roles) as run:
        run(input_ids=text, attention_mask=seen)
        found = run[TAG(2)][0].map.float()
    for row, (alone, asked, image) in enumerate(((short, (8, 9), (1, 2, 3)), (long, (9, 10, 11), (2, 3, 4, 5)))):
        maps = model(input_ids=alone, output_attentions=True).attentions
        assert close_model(found[row, : len(image)], torch.tensor(by_hand(maps, 0, asked, image, 2)))
    assert found[0, 3] == 0


@torch.no_grad()
def test_an_encoder_of_images_is_not_listened_to() -> None:
    vision = {"image_size": 16}
    model: Any = models.tiny("llava", attn_implementation="eager", vision_config=vision, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22)
    roles = {"image": ((1, 17),), "question": ((0, 1), (17, 22))}  # the first token of both
    with heedful.attach(model, TAG(3), roles=roles) as run:
        run(**inputs)
        (found,) = run[TAG(3)]
    maps = model(**inputs, output_attentions=True).attentions
    wanted = by_hand(maps, 0, (0, *range(17, 22)), tuple(range(1, 17)), 3)
    assert close_model(found.map[0].float(), torch.tensor(wanted))


def test_what_a_map_tells() -> None:
    found = Grounding(torch.tensor([[0.1, 0.4, 0.2, 0.19], [0.3, 0.0, 0.1, 0.2]]))
    assert found.place.tolist() == [1, 0]
    assert found.near().tolist() == [[False, True, True, False], [True, False, False, True]]
    assert found.near(0.2).tolist() == [[True, True, True, True], [True, False, True, True]]
    assert str(found) == "the image's tokens [1, 0] of 4"


def test_defaults_and_wrong_fields() -> None:
    assert (TAG().count, TAG().asked, TAG().role, TAG(1).count) == (10, "question", "image", 1)
    for name, wrong in (("count", 0), ("asked", ""), ("role", "")):
        with pytest.raises(FieldError, match=rf"TAG\.{name} = "):
            TAG(**{name: wrong})
