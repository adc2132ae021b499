"""AttentionRAG against dense maps, chunk by chunk: which sentences hold the most attended tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import heedful
from heedful import Prompt, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.sparse.tokens.attention_rag import AttentionRAG, _LastQuery
from tests.methods import documents

SPANS = (*documents.SPANS, (19, 20))
prompt = partial(documents.prompt, spans=SPANS, end=(22, 26))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")


def last_row(model: Any, tokens: list[int]) -> list[float]:
    with torch.no_grad():
        maps = model(torch.tensor([tokens]), output_attentions=True).attentions
    total = torch.zeros(len(tokens))
    for layer in maps:
        total += sum(head[-1] for head in layer[0]) / layer.shape[1]
    return total.tolist()


def by_hand(model: Any, shown: Prompt, groups: list[list[int]], top: int) -> list[int]:
    """The numbers of the sentences that stay, of chunks that hold these ones."""
    tokens, kept = list(shown.tokens), []
    inside = [i for a, b in SPANS for i in range(a, b)]
    for group in groups:
        mine = {i: number for number in group for i in range(*SPANS[number])}
        read = [i for i in range(len(tokens)) if i not in inside or i in mine]
        row = dict(zip(read, last_row(model, [tokens[i] for i in read]), strict=True))
        best = sorted(mine, key=lambda i: -row[i])[:top]
        kept += sorted({mine[i] for i in best})
    return kept


@pytest.mark.parametrize("how", [{"backend": "reference"}, {"tile_rows": 3}])
def test_what_the_last_query_looks_at(model: Any, how: dict[str, Any]) -> None:
    shown = prompt()
    reader = _LastQuery(26)
    with heedful.attach(model, reader, **how) as run, torch.no_grad():
        run(torch.tensor([shown.tokens]))
    assert close_model(run[reader], torch.tensor(last_row(model, list(shown.tokens))))


@pytest.mark.parametrize(
    ("chunk", "groups"),
    [(300, [[0, 1, 2, 3, 4]]), (17, [[0, 1, 2, 3, 4]]), (16, [[0, 1, 2, 3], [4]]), (9, [[0, 1], [2, 3, 4]]),
     (5, [[0], [1], [2], [3], [4]])],
)  # fmt: skip
@pytest.mark.parametrize("top", [1, 2, 4])
def test_sentences_that_hold_the_best_tokens_stay(model: Any, chunk: int, groups: list[list[int]], top: int) -> None:
    for seed in range(3):
        shown = prompt(seed)
        kept = by_hand(model, shown, groups, top)
        found = heedful.arrange(model, shown, AttentionRAG(top=top, chunk=chunk))
        gone = {i for number, (a, b) in enumerate(SPANS) if number not in kept for i in range(a, b)}
        assert found.tokens == tuple(t for i, t in enumerate(shown.tokens) if i not in gone), (seed, kept)
        assert len(found.roles["documents"]) == len(kept)
        a, b = found.roles["end"][0]
        assert found.tokens[a:b] == shown.tokens[22:]


def test_neutral_changes_nothing_and_the_role_has_a_name_of_choice(model: Any) -> None:
    shown = prompt()
    assert heedful.arrange(model, shown, AttentionRAG.neutral()) is shown
    found = heedful.arrange(model, prompt(role="lines"), AttentionRAG("lines", 2))
    assert found.tokens == heedful.arrange(model, shown, AttentionRAG(top=2)).tokens
    nothing = Prompt((5, 6, 7), {"documents": ()})
    assert heedful.arrange(model, nothing, AttentionRAG()) is nothing


def test_equal_tokens_are_taken_in_order() -> None:
    found = AttentionRAG(top=4).arrange(prompt(), lambda shown, method: torch.ones(len(shown)))
    assert found.roles["documents"] == ((2, 5), (5, 11))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"role": ""}, r"AttentionRAG\.role = '': must name a role"),
        ({"top": 0}, r"AttentionRAG\.top = 0: must be 1 or more.*12"),
        ({"chunk": 0}, r"AttentionRAG\.chunk = 0: must be 1 or more.*300"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        AttentionRAG(**settings)
    AttentionRAG(top=1, chunk=1)
