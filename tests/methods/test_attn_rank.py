"""AttnRank against dense maps: what slots get, where items go, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heedful import Prompt, arrange, attach, fit, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.attn_rank import AttnRank, _SlotAttention
from tests.methods.documents import SPANS, prompt


def batch(shown: Prompt) -> dict[str, Any]:
    return {"input_ids": torch.tensor([shown.tokens]), "roles": shown.roles}


def given(model: Any, shown: Prompt) -> torch.Tensor:
    """`[layers slots]`, in loops: all of what rows 19 to 22 give each slot, over four rows and four heads."""
    with torch.no_grad():
        maps = model(torch.tensor([shown.tokens]), output_attentions=True).attentions
    out = torch.zeros(len(maps), len(SPANS))
    for layer, weights in enumerate(maps):
        for slot, (a, b) in enumerate(SPANS):
            rows = [float(weights[0, head, row, a:b].sum()) for head in range(4) for row in range(19, 23)]
            out[layer, slot] = sum(rows) / len(rows)
    return out


@pytest.mark.parametrize("kind", ["llama", "mqa", "mistral"])
def test_what_slots_get_is_that_of_the_whole_map(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    shown, reader = prompt(), _SlotAttention("documents")
    for how in ({"backend": "reference"}, {"tile_rows": 1}, {"tile_rows": 7}):
        with attach(model, reader, roles=shown.roles, **how) as run, torch.no_grad():
            run(torch.tensor([shown.tokens]))
        assert close_model(run[reader].float(), given(model, shown))


def test_a_fit_takes_the_mean_of_prompts() -> None:
    model = models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")
    shown = [prompt(seed) for seed in range(3)]
    mean = torch.stack([given(model, x) for x in shown]).mean(0)
    for layer, wanted in ((None, mean.mean(0)), (0, mean[0]), (2, mean[2])):
        found = fit(AttnRank(layer=layer), model, [batch(x) for x in shown])
        assert close_model(torch.tensor(found.attention), wanted)
        assert found.layer == layer


@pytest.mark.parametrize(
    ("attention", "items"),  # where the best item, A, goes, and so on
    [
        ((0.4, 0.1, 0.2, 0.3), "ADCB"),
        ((0.2, 0.4, 0.1, 0.3), "CADB"),
        ((0.1, 0.2, 0.3, 0.4), "DCBA"),
        ((0.4, 0.3, 0.2, 0.1), "ABCD"),
        ((0.3, 0.3, 0.3, 0.4), "BCDA"),  # slots that get as much keep the order
    ],
)
def test_items_go_where_attention_goes(attention: tuple[float, ...], items: str) -> None:
    start = prompt()
    found = AttnRank(attention=attention).arrange(start, lambda *_: None)
    parts = dict(zip("ABCD", (start.tokens[a:b] for a, b in SPANS), strict=True))
    got = [found.tokens[a:b] for a, b in found.roles["documents"]]
    assert got == [parts[name] for name in items]
    assert found.roles["end"] == ((20, 23),)
    assert sorted(found.tokens) == sorted(start.tokens)


def test_the_role_has_a_name_of_choice() -> None:
    model = models.tiny("llama")
    tables = fit(AttnRank("tables"), model, [batch(prompt(role="tables"))])
    documents = fit(AttnRank(), model, [batch(prompt())])
    assert tables.attention == documents.attention
    assert arrange(model, prompt(role="tables"), tables).tokens == arrange(model, prompt(), documents).tokens


def test_says_what_is_wrong() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match="must name a role"):
        AttnRank(role="")
    with pytest.raises(FieldError, match="layer = -1: must be 0 or more, or None"):
        AttnRank(layer=-1)
    with pytest.raises(FieldError, match="must be below 2, the model's layers"):
        fit(AttnRank(layer=2), model, [batch(prompt())])
    for attention in ((), (0.1, 0.2, 0.3)):
        with pytest.raises(FieldError, match="must hold the attention to each of 4 slots"):
            arrange(model, prompt(), AttnRank(attention=attention))
    with pytest.raises(FieldError, match="no spans named 'tables'"):
        arrange(model, prompt(), AttnRank("tables"))
    bare, ended = prompt(role="tables"), Prompt(prompt().tokens[:19], {"documents": SPANS})
    two = {"input_ids": torch.tensor([prompt().tokens] * 2), "roles": prompt().roles}
    for wrong in (batch(bare), batch(ended), two, {"input_ids": torch.tensor([prompt().tokens])}):
        with pytest.raises(FieldError, match="each one text with spans of 'documents'"):
            fit(AttnRank(), model, [wrong])
    image = models.tiny("vit")
    with pytest.raises(FieldError, match=r"batches = \['pixel_values'\].*each one text with spans of 'documents'"):
        fit(AttnRank(), image, [models.tiny_inputs(image)])
    fewer = Prompt(prompt().tokens, {"documents": SPANS[:2]})
    for batches in ([], [batch(prompt()), batch(fewer)]):
        with pytest.raises(FieldError, match="must be one prompt or more, all of as many items"):
            fit(AttnRank(), model, batches)
