"""Faithfulness: what is removed of a text, and what comes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heedful import models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import HeedfulError
from heedful.explaining.attribution import Attribution
from heedful.explaining.faithful import Faithfulness, Removal, faithfulness

IDS = torch.tensor([[5, 17, 9, 88, 40, 23, 61]])


def log_chance(model: nn.Module, ids: Tensor, target: int, kept: list[int] | None = None) -> float:
    """With the model's own mask of attention."""
    mask = torch.ones_like(ids)
    if kept is not None:
        mask[0] = 0
        mask[0, kept] = 1
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=mask).logits[0, -1].log_softmax(-1)[target])


def test_curves_are_what_the_model_says_without_those_tokens() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    scores = torch.tensor([9.0, 1.0, 4.0, 3.0, 2.0, 5.0, 8.0])  # of the five that may go: 5, 2, 3, 4, 1
    found = faithfulness(model, IDS, scores, target=50, steps=5, seeds=1)
    whole = log_chance(model, IDS, 50)
    order = [5, 2, 3, 4, 1]
    falls = [log_chance(model, IDS, 50, [i for i in range(7) if i not in order[:c]]) - whole for c in range(6)]
    rises = [log_chance(model, IDS, 50, sorted([0, 6, *order[:c]])) - whole for c in range(6)]
    assert found.shares == (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert close_model(found.deletion["scores"].float(), torch.tensor(falls))
    assert close_model(found.insertion["scores"].float(), torch.tensor(rises))
    assert close_model(found.random_deletion[0, [0, 5]].float(), torch.tensor(falls)[[0, 5]])
    assert close(found.random_insertion[0].flip(0), found.random_deletion[0])


def test_an_attribution_is_taken_as_its_scores() -> None:
    model, told = models.tiny("llama"), Attribution(list("abcdefg"), torch.arange(7.0), "mine")
    one, other = (faithfulness(model, IDS, x, steps=2, seeds=1) for x in (told, {"scores": told.scores}))
    assert torch.equal(one.deletion["scores"], other.deletion["scores"])


def test_tokens_can_be_replaced_instead() -> None:
    model = models.tiny("bert")
    scores = torch.arange(7.0)
    found = faithfulness(model, IDS, scores, target=50, position=3, removal=Removal((), token=2), steps=6, seeds=1)
    changed = IDS.clone()
    changed[0, [6, 5, 4]] = 2
    with torch.no_grad():
        a, b = (model(input_ids=x).logits[0, 3].log_softmax(-1)[50] for x in (changed, IDS))
    assert close_model(found.deletion["scores"][3].float(), a - b)
    changed[0, [0, 1, 2]] = 2  # all but the one that is predicted at
    with torch.no_grad():
        last = model(input_ids=changed).logits[0, 3].log_softmax(-1)[50]
    assert close_model(found.deletion["scores"][6].float(), last - b)


def test_without_logits_the_mean_state_is_followed() -> None:
    model, scores = models.tiny("bert").bert, torch.arange(7.0)
    found = faithfulness(model, IDS, scores, removal=Removal((), token=2), steps=7, seeds=2)
    changed = IDS.clone()
    changed[0, 4:] = 2
    with torch.no_grad():
        left, whole = (model(input_ids=x).last_hidden_state[0] for x in (changed, IDS))
    cosine = torch.cosine_similarity(left[:4].mean(0), whole.mean(0), 0)
    assert found.unit == "cosine"
    assert close_model(found.deletion["scores"][[0, 3, 7]].float(), torch.tensor([1.0, float(cosine), 0.0]))
    assert close_model(found.random_insertion[:, [0, 7]].float(), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    hidden = faithfulness(model, IDS, scores, removal=Removal(()), steps=7, seeds=1)
    assert close_model(hidden.deletion["scores"][[0, 7]].float(), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("room", "texts"), [(21, 3), (20, 2), (1, 1)])
def test_as_many_texts_are_read_at_once_as_there_is_room_for(
    room: int, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heedful.explaining.faithful.TOKENS", room)
    model, read = models.tiny("llama"), []
    model.register_forward_pre_hook(lambda _, args, given: read.append(len(given["input_ids"])), with_kwargs=True)
    faithfulness(model, IDS, torch.rand(7), steps=5, seeds=1)
    assert max(read[1:-1]) == min(read[1:-1]) == texts  # the first is the whole text, the last what is left over


def test_gains_are_areas_against_random_order() -> None:
    falls, rises = torch.tensor([0.0, -3.0, -4.0]), torch.tensor([-4.0, -1.0, 0.0])
    random = torch.tensor([[0.0, -2.0, -4.0], [0.0, -1.0, -4.0]])
    found = Faithfulness("nats", 3, (0.0, 0.5, 1.0), {"a": falls}, {"a": rises}, random, random.flip(1))
    fall, rise = found.gains["a"]
    assert fall == pytest.approx(-1.75 - (-2.5))
    assert rise == pytest.approx(-1.5 - (-1.75))
    assert [f.key for f in found.figures] == ["deletion", "insertion"]
    assert set(found.figures[0].lines) == {"a", "random order"}
    for figure, line, mean in zip(found.figures, (falls, rises), ([0.0, -1.5, -4.0], [-4.0, -1.5, 0.0]), strict=True):
        assert figure.lines["a"] is line
        assert figure.lines["random order"].tolist() == mean
    assert "+0.750  +0.250" in str(found)


def test_the_tokens_that_matter_beat_random_order_and_the_others_lose() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    ids = torch.randint(3, 127, (1, 14), generator=torch.Generator().manual_seed(3))
    target = int(model(input_ids=ids).logits[0, -1].argmax())
    whole = log_chance(model, ids, target)
    harm = torch.tensor([whole - log_chance(model, ids, target, [j for j in range(14) if j != i]) for i in range(14)])
    gains = faithfulness(model, ids, {"best": harm, "worst": -harm}, steps=12, seeds=4).gains
    assert gains["best"][0] > 0 > gains["worst"][0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: faithfulness(m, IDS, torch.rand(6)), "finite scores"),
        (lambda m: faithfulness(m, IDS, torch.full((7,), float("nan"))), "finite scores"),
        (lambda m: faithfulness(m, IDS, torch.rand(7), steps=0), "steps = 0: must be 1 or more"),
        (lambda m: faithfulness(m, IDS, torch.rand(7), removal=Removal(tuple(range(7)))), "leaves none"),
        (lambda m: faithfulness(m, IDS, torch.rand(7), target=128), "must be a token from 0 to 127"),
    ],
)
def test_says_what_is_wrong(call, match: str) -> None:
    with pytest.raises(HeedfulError, match=match):
        call(models.tiny("llama"))
