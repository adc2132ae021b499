"""Attention sorting against dense maps: the scores, the order, the rounds, and what it refuses."""

import pytest
import torch

import heedful
from heedful import Prompt, catalogue, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language._documents import _DocumentAttention
from heedful.methods.intervene.language.attention_sorting import AttentionSorting
from tests.methods.documents import prompt


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")


def scores(model, shown: Prompt) -> torch.Tensor:
    with torch.no_grad():
        maps = torch.stack(model(torch.tensor([shown.tokens]), output_attentions=True).attentions)
    last = maps.double().mean((0, 2))[0, -1]  # layers, then heads, averaged
    return torch.stack([last[a:b].sum() for a, b in shown.roles["documents"]])


@pytest.mark.parametrize("kind", ["llama", "mqa", "mistral"])
def test_scores_are_those_of_the_whole_map(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    shown = prompt()
    reader = _DocumentAttention("documents", 22)
    for how in ({"backend": "reference"}, {"tile_rows": 1}, {"tile_rows": 7}):
        with heedful.attach(model, reader, roles=shown.roles, **how) as run, torch.no_grad():
            run(torch.tensor([shown.tokens]))
        assert close_model(run[reader].float(), scores(model, shown).float())


def test_one_round_puts_the_most_attended_last(model) -> None:
    start = prompt()
    order = tuple(scores(model, start).argsort().tolist())
    assert order != (0, 1, 2, 3)
    found = heedful.arrange(model, start, AttentionSorting(rounds=1))
    assert found == start.reordered("documents", order)
    assert found.roles["end"] == ((20, 23),)


def test_rounds_read_the_new_order_each_time(model) -> None:
    for seed in range(4):
        wanted = start = prompt(seed)
        for rounds in range(4):
            assert heedful.arrange(model, start, AttentionSorting(rounds=rounds)) == wanted
            wanted = wanted.reordered("documents", tuple(scores(model, wanted).argsort().tolist()))


def test_stops_where_the_order_stands_still() -> None:
    reads = []

    def read(shown: Prompt, method: object) -> torch.Tensor:
        reads.append(shown)
        return torch.tensor([0.1, 0.4, 0.4, 0.9])

    step = AttentionSorting(rounds=5)
    assert step.arrange(prompt(), read) == prompt()  # equal ones keep their order
    assert len(reads) == 1


def test_neutral_changes_nothing_and_example_does(model) -> None:
    assert heedful.arrange(model, prompt(), AttentionSorting.neutral()) is not None
    assert heedful.arrange(model, prompt(), AttentionSorting.neutral()) == prompt()
    assert heedful.arrange(model, prompt(), AttentionSorting.example()) != prompt()
    one = Prompt((5, 6, 7, 8), {"documents": ((1, 3),)})
    assert heedful.arrange(model, one, AttentionSorting()) == one


def test_the_role_has_a_name_of_choice(model) -> None:
    found = heedful.arrange(model, prompt(role="tables"), AttentionSorting("tables"))
    assert found.tokens == heedful.arrange(model, prompt(), AttentionSorting()).tokens


def test_says_what_is_wrong(model) -> None:
    with pytest.raises(FieldError, match="rounds = -1: must be 0 or more"):
        AttentionSorting(rounds=-1)
    with pytest.raises(FieldError, match="must name a role"):
        AttentionSorting(role="")
    for rounds in (0, 3):
        with pytest.raises(FieldError, match="no spans named 'tables'"):
            heedful.arrange(model, prompt(), AttentionSorting("tables", rounds))


def test_the_catalogue_lists_the_step_and_not_its_reader() -> None:
    listed = catalogue.entries()
    assert listed["AttentionSorting"] is AttentionSorting
    assert not any("_DocumentAttention" in name for name in listed)


def test_of_many_documents_alike_none_moves() -> None:
    start = Prompt(tuple(range(3, 43)), {"documents": tuple((i, i + 1) for i in range(39))})
    assert AttentionSorting(rounds=1).arrange(start, lambda *_: torch.zeros(39)) == start
