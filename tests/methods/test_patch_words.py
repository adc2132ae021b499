"""PatchWords: layers that read another prompt, against models whose projections are handed it by hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.explain.patch_words import PatchWords

from .painter import HEADS, WIDTH, WORDS, Painter, inputs


def _by_hand(model: Painter, layers: tuple[int, ...], x: Tensor, context: Tensor, other: Tensor) -> Tensor:
    for number, layer in enumerate(model.layers):
        x = x + layer(x, context=other if number in layers else context)
    return x


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("rows", [1, 3])
def test_chosen_layers_read_the_other_prompt(layers: tuple[int, ...], rows: int) -> None:
    model, given = Painter(), inputs(3)
    other = inputs(rows, seed=1)
    method = fit(PatchWords(), model, [other])
    assert set(method.words) == {f"{name}.{layer}" for name in ("key", "value") for layer in (0, 1)}
    want = _by_hand(model, layers, given["x"], given["context"], other["context"])
    with attach(model, method.on(layers=layers), inputs=given) as run:
        assert close(run(**given).float(), want.float())
    assert not close(want.float(), model(**given).float())


def test_random_words_are_other_ones_in_each_layer() -> None:
    model, given = Painter(), inputs()
    x = given["x"]
    for number, layer in enumerate(model.layers):
        k, v = (
            torch.stack([one[:, head] for head in range(HEADS)])
            for one in (
                torch.randn(WORDS, HEADS, WIDTH // HEADS, generator=torch.Generator().manual_seed(seed)).double()
                for seed in (3_000_009 + 2 * number, 3_000_010 + 2 * number)
            )
        )
        weights = (layer.heads(layer.q(x)) @ k.mT / (WIDTH / HEADS) ** 0.5).softmax(-1)  # type: ignore[union-attr]
        x = x + (weights @ v).transpose(1, 2).flatten(2)
    with attach(model, PatchWords(seed=3), inputs=given) as run:
        assert close(run(**given).float(), x.float())


def test_self_attention_is_left_alone() -> None:
    model = models.tiny("bart")
    given, other = ({n: torch.randint(3, 60, (2, 7)) for n in ("input_ids", "decoder_input_ids")} for _ in range(2))
    names = [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    with torch.no_grad():
        encoded = model.model.encoder(input_ids=other["input_ids"])
        want = model(encoder_outputs=encoded, decoder_input_ids=given["decoder_input_ids"]).logits
    method = fit(PatchWords(), model, [{**given, "input_ids": other["input_ids"]}])
    assert len(method.words) == 2 * len(names)
    with torch.no_grad(), attach(model, method) as run:
        assert close_model(run(**given).logits, want)


def test_errors() -> None:
    model, given = Painter(), inputs(3)
    with (
        pytest.raises(FieldError, match=r"PatchWords.words = None: must be fitted with heedful.fit\(\) to a forward"),
        attach(model, PatchWords(), inputs=given) as run,
    ):
        run(**given)
    words = dict(fit(PatchWords(), model, [given]).words)
    cases: tuple[dict[str, Tensor], ...] = (
        {name: x for name, x in words.items() if name != "value.1"},
        {name: x[:, :, 1:] for name, x in words.items()},
        {name: x[:2] for name, x in words.items()},
    )
    for found in cases:
        with (
            pytest.raises(FieldError, match="fit to this model and as many words"),
            attach(model, PatchWords(words=Fitted(found)), inputs=given) as run,
        ):
            run(**given)
    batches: tuple[list[dict[str, Any]], ...] = ([], [given, given])
    for wrong in batches:
        with pytest.raises(FieldError, match=f"PatchWords.batches = {len(wrong)}: must be one forward"):
            fit(PatchWords(), model, wrong)
