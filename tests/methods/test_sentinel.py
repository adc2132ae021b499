"""Sentinel against dense maps, and a regression on what the sentences get."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import Prompt, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.kit.regression import logistic
from heedful.methods import Sentinel
from heedful.methods.sparse.tokens import sentinel
from heedful.methods.sparse.tokens.sentinel import _EachHead
from tests.methods import documents
from tests.methods.documents import kept_by

SPANS = (*documents.SPANS, (19, 20))
prompt = partial(documents.prompt, spans=SPANS, end=(22, 26))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")


def by_hand(model: Any, shown: Prompt) -> Tensor:
    """Features `[sentences layers*heads]` from the model's own maps."""
    with torch.no_grad():
        maps = model(torch.tensor([shown.tokens]), output_attentions=True).attentions
    rows = [layer[0, h, -1] for layer in maps for h in range(layer.shape[1])]
    return torch.tensor([[float(row[a:b].sum()) / (b - a) / float(row[2:20].sum()) for row in rows] for a, b in SPANS])


@pytest.mark.parametrize("how", [{"backend": "reference"}, {"tile_rows": 3}])
def test_what_the_last_query_looks_at(model: Any, how: dict[str, Any]) -> None:
    shown, reader = prompt(), _EachHead(26)
    with heedful.attach(model, reader, **how) as run, torch.no_grad():
        run(torch.tensor([shown.tokens]))
    with torch.no_grad():
        maps = model(torch.tensor([shown.tokens]), output_attentions=True).attentions
    assert close_model(run[reader], torch.cat([layer[0, :, -1] for layer in maps]))


@pytest.mark.parametrize(("budget", "room"), [(0.5, 9), (0.3, 6), (1, 1), (12, 12), (16, 16)])
def test_sentences_of_the_best_scores_stay_while_there_is_room(model: Any, budget: float, room: int) -> None:
    random = torch.Generator().manual_seed(1)
    names = ("weight", "mean", "deviation")
    probe = {name: torch.rand(3 * model.config.num_attention_heads, generator=random) + 0.1 for name in names}
    probe["weight"] -= 0.6
    method = Sentinel(budget, probe=Fitted(probe | {"bias": torch.tensor([0.3])}))
    for seed in range(4):
        shown = prompt(seed)
        scores = ((by_hand(model, shown) - probe["mean"]) / probe["deviation"]) @ probe["weight"] + 0.3
        kept = kept_by(scores.tolist(), room, SPANS)
        found = heedful.arrange(model, shown, method)
        gone = {i for number, (a, b) in enumerate(SPANS) if number not in kept for i in range(a, b)}
        assert found.tokens == tuple(t for i, t in enumerate(shown.tokens) if i not in gone), (seed, kept)
        assert len(found.roles["documents"]) == len(kept)
        a, b = found.roles["end"][0]
        assert found.tokens[a:b] == shown.tokens[22:]


def test_the_bias_and_the_scores_of_a_probe() -> None:
    two = {"weight": [2.0, 0.0], "mean": [1.0, 0.0], "deviation": [4.0, 1.0], "bias": [0.5]}
    method = Sentinel(probe=Fitted({name: torch.tensor(x) for name, x in two.items()}))
    assert method.scores(torch.tensor([[3.0, 9.0], [1.0, 0.0]])).tolist() == [1.5, 0.5]


def test_a_fit_reads_the_sentences_of_each_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(sentinel, "logistic", lambda *given: asked.append(given) or logistic(*given))
    texts = [prompt(seed) for seed in range(4)]
    labels = [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]]
    batches = [
        {"input_ids": torch.tensor([p.tokens]), "roles": p.roles, "label": label}
        for p, label in zip(texts, labels, strict=True)
    ]
    method = heedful.fit(Sentinel(), model, batches)
    ((points, told),) = asked
    assert close_model(points, torch.cat([by_hand(model, p) for p in texts]))
    assert told.tolist() == torch.tensor(labels).flatten().tolist()
    assert method.probe == Fitted(logistic(points, told))


def test_neutral_changes_nothing_and_the_role_has_a_name_of_choice(model: Any) -> None:
    shown = prompt()
    assert heedful.arrange(model, shown, Sentinel.neutral()) is shown
    other = heedful.arrange(model, prompt(role="facts"), Sentinel(role="facts", seed=0))
    assert other.tokens == heedful.arrange(model, shown, Sentinel.example()).tokens
    assert other.tokens != shown.tokens
    empty = Prompt((1, 2), {"documents": ()})
    assert heedful.arrange(model, empty, Sentinel()) is empty


def test_errors(model: Any) -> None:
    assert Sentinel().budget == 0.5
    with pytest.raises(FieldError, match="budget = 0"):
        Sentinel(0)
    with pytest.raises(FieldError, match="role = ''"):
        Sentinel(role="")
    with pytest.raises(FieldError, match="probe = None: must be fitted"):
        heedful.arrange(model, prompt(), Sentinel())
    names = ("weight", "mean", "deviation", "bias")
    with pytest.raises(FieldError, match="fitted to another model: to points of 1 numbers, and these are of 12"):
        heedful.arrange(model, prompt(), Sentinel(probe=Fitted({name: torch.ones(1) for name in names})))
    text = {"input_ids": torch.tensor([prompt().tokens]), "roles": prompt().roles}
    with pytest.raises(FieldError, match="a label for each of 5 sentences"):
        heedful.fit(Sentinel(), model, [text | {"label": [0, 1]}])
    for batches in ([], [text | {"label": [0] * 5}]):
        with pytest.raises(FieldError, match="sentences of both labels"):
            heedful.fit(Sentinel(), model, batches)
