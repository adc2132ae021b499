"""LargePiG against the authors' steps: a pointer from the last layer's map, weighed by early exits, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import Prompt, decode, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.core.kinds.decode import Read
from heedful.methods.intervene.language.largepig import LAST, LargePiG, _Pointer
from heedful.text_models import text_model

SPANS = ((1, 4), (6, 9))
TOKENS = (5, 9, 31, 9, 7, 8, 40, 31, 12, 3, 77)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", num_hidden_layers=4, attn_implementation="eager")


def softmax(x: Tensor) -> list[float]:
    top = float(x.max())
    each = [math.exp(float(v) - top) for v in x]
    return [v / sum(each) for v in each]


def divergence(last: list[float], early: list[float]) -> float:
    """Of their middle from either, a mean over the vocabulary."""
    found = 0.0
    for a, b in zip(last, early, strict=True):
        m = (a + b) / 2
        found += (m * math.log(m / a) + m * math.log(m / b)) / 2 / len(last)
    return found


@torch.no_grad()
def by_hand(model: Any, tokens: Sequence[int], method: LargePiG) -> tuple[list[float], float]:
    """The mixture after a text, and p."""
    out = model(torch.tensor([tokens]), output_hidden_states=True, output_attentions=True, use_cache=False)
    last = softmax(out.logits[0, -1])
    exits = [softmax(model.lm_head(model.model.norm(out.hidden_states[i + 1][0, -1]))) for i in method.layers]
    p = min(method.scale * max(divergence(last, early) for early in exits), method.most)
    row = [sum(float(head[-1, j]) for head in out.attentions[-1][0]) for j in range(len(tokens))]
    places = [j for a, b in SPANS for j in range(a, b)]
    whole = sum(row[j] for j in places)
    mixed = [(1 - p) * x for x in last]
    for j in places:
        mixed[tokens[j]] += p * row[j] / whole
    return mixed, p


@pytest.mark.parametrize("layers", [(0,), (1, 0, 2)])
@pytest.mark.parametrize(("scale", "most"), [(40.0, 0.9), (1e5, 0.5), (1e5, 1.0)])
@pytest.mark.parametrize("cut", [None, 10])
def test_the_authors_steps(model: Any, layers: tuple[int, ...], scale: float, most: float, cut: int | None) -> None:
    method, tokens = LargePiG(layers=layers, scale=scale, most=most), list(TOKENS)
    with text_model(model, method) as voice:
        found = voice.read(Prompt(TOKENS, {"context": SPANS}), cut)[0]
        for more in (17, 31, None):
            mixed, p = by_hand(model, tokens, method)
            assert close_model(found.exp(), torch.tensor(mixed))
            assert p == most if scale > 1e4 else 0 < p < most
            if more is not None:
                found = voice.go_on(more)
                tokens.append(more)


def test_a_pointer_alone_says_words_of_the_source(model: Any) -> None:
    said = decode(model, Prompt(TOKENS, {"context": SPANS}), LargePiG(layers=(0,), scale=1e6, most=1.0), new_tokens=6)
    assert set(said) <= {TOKENS[i] for a, b in SPANS for i in range(a, b)}


def test_where_nothing_may_be_copied_nothing_is_read(model: Any) -> None:
    prompt = Prompt(TOKENS)
    assert list(LargePiG.neutral().variants(prompt)) == [LAST]
    logits = torch.randn(5)
    assert torch.equal(LargePiG.neutral().combine({LAST: logits}), logits)
    plain = model.generate(torch.tensor([TOKENS]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert decode(model, prompt, LargePiG.neutral(), new_tokens=4) == tuple(plain[0, len(TOKENS) :].tolist())


def test_words_that_nobody_says_stay_finite() -> None:
    logits = {LAST: torch.tensor([0.0, -500.0]), "layer 0": torch.tensor([0.0, -400.0])}
    read: Read = {LAST: {_Pointer(0, (0,), (0,)): (torch.tensor([0]), torch.tensor([1.0]))}}
    assert bool(LargePiG(layers=(0,)).combine(logits, read).isfinite().all())
    assert LargePiG(layers=(0,)).combine({k: x.half() for k, x in logits.items()}, read).dtype is torch.float32
    assert float(LargePiG(layers=(0,)).copying({LAST: torch.ones(3), "layer 0": torch.ones(3)})) == 0


def test_layers_that_the_model_lacks_are_refused(model: Any) -> None:
    with pytest.raises(FieldError, match=r"LargePiG\.layers = 9: must be below 4"):
        decode(model, Prompt(TOKENS, {"context": SPANS}), LargePiG(layers=(0, 9)))
    with pytest.raises(FieldError, match="no spans named 'context'"):
        decode(model, Prompt(TOKENS), LargePiG(layers=(0,)))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"role": ""}, r"LargePiG\.role"),
        ({"layers": ()}, r"LargePiG\.layers"),
        ({"layers": (-1,)}, r"LargePiG\.layers"),
        ({"layers": (1, 1)}, r"LargePiG\.layers"),
        ({"scale": -1.0}, r"LargePiG\.scale"),
        ({"scale": math.inf}, r"LargePiG\.scale"),
        ({"most": 1.1}, r"LargePiG\.most"),
        ({"most": -0.1}, r"LargePiG\.most"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        LargePiG(**settings)
