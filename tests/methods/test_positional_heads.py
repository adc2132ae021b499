"""Correlations of the slow part with whole scores against brute force, query by query."""

from functools import partial

import pytest
import torch

import heedful
from heedful import models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, StatisticError
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.methods.observe import positional_heads
from heedful.methods.observe.positional_heads import Positional, PositionalHeads
from tests import readers
from tests.readers import ids, padded

METHOD = PositionalHeads(far=5, rows=4, high=0.5)
found = partial(readers.found, method=METHOD)


class SpyQuery(Method):
    paper = PositionalHeads.paper

    @reads(Site.QUERY)
    def keep(self, x, call):
        return Cat.of(f"{call.forward}", x)


class SpyKey(Method):
    paper = PositionalHeads.paper

    @reads(Site.KEY)
    def keep(self, x, call):
        return Cat.of(f"{call.forward}", call.spread(x))


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=2)


def test_is_the_correlation_of_the_slow_half(model) -> None:
    text = torch.cat([ids(24, 1), ids(24, 2)])
    stack = METHOD | SpyQuery() | SpyKey()
    with heedful.attach(model, stack) as run, torch.no_grad():
        run(input_ids=text)
    positional = run[METHOD]
    slow = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]).double()  # llama turns dimensions j and j + 4 together, slower with j
    for n in range(2):
        q, k = run[SpyQuery()][n].value[0].double(), run[SpyKey()][n].value[0].double()
        for h in range(4):
            whole, part, parts = [], [], []
            for row in range(2):
                for t in (5, 11, 17, 23):
                    keys = k[row, h, : t - 4]
                    each = q[row, h, t] * keys
                    each = each - each.mean(0)
                    whole.append(each.sum(-1))
                    part.append((each * slow).sum(-1))
                    parts.append(each)
            s, p, e = torch.cat(whole), torch.cat(part), torch.cat(parts)
            r = (s @ p) / (s.norm() * p.norm())
            assert float(positional.correlation[n][h]) == pytest.approx(float(r), abs=1e-4)
            assert close_model(positional.share[n][h].float(), (s @ e / (s @ s)).float())
            assert float(positional.share[n][h].sum()) == pytest.approx(1.0)
    assert 0 < len(positional.heads) < 8


def test_each_layer_has_its_own_slow_half(model, monkeypatch: pytest.MonkeyPatch) -> None:
    def correlations(*slow: int) -> list[torch.Tensor]:
        """Of both layers, where dimensions from 4 on turn slowly (1), or those before (0)."""
        turns = [torch.arange(8.0), torch.arange(8.0).flip(0)]
        monkeypatch.setattr(positional_heads, "periods", lambda call, width: turns[1 - slow[call.layer]])
        answer = found(model, {"input_ids": ids(24)})
        return [answer.correlation[n] for n in range(2)]

    unlike, late, early = correlations(1, 0), correlations(1, 1), correlations(0, 0)
    assert torch.equal(unlike[0], late[0])
    assert torch.equal(unlike[1], early[1])
    assert not close_model(late[1].float(), early[1].float())


def test_a_head_of_slow_dimensions_alone_is_positional() -> None:
    planted = models.tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        fast = torch.tensor([0, 1, 4, 5])
        planted.model.layers[0].self_attn.q_proj.weight[2 * 8 + fast] = 0.0  # of head 2
    method = PositionalHeads(far=5, high=0.999)
    answer = found(planted, {"input_ids": ids(30)}, method=method)
    assert list(answer.heads) == [(0, 2)]
    told = method.describe(answer)
    assert told.findings[0].text.startswith("25% of heads score distant tokens")
    assert list(told.roles[0].heads) == [(0, 2)]
    assert float(told.figures[1].lines["all heads"].sum()) == pytest.approx(1.0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(16, 1), ids(23, 2)
    both = padded(short, long, left)
    if left:
        both["position_ids"] = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as `generate` gives them
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, both)
    for n in apart.share:
        assert close_model(together.correlation[n].float(), apart.correlation[n].float())
        assert close_model(together.share[n].float(), apart.share[n].float())


def test_reads_nothing_without_rotary_embedding_and_nothing_while_decoding(model) -> None:
    gpt2 = models.tiny("gpt2")
    with heedful.attach(gpt2, METHOD) as run, torch.no_grad():
        run(input_ids=ids(20))
    with pytest.raises(StatisticError, match="has read nothing of what ran"):
        run[METHOD]
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        run.generate(ids(20), max_new_tokens=4, do_sample=False)
        got = run[METHOD]
    whole = found(model, {"input_ids": ids(20)})
    assert close_model(got.share[0].float(), whole.share[0].float())


def test_texts_too_short_to_look_far_say_nothing(model) -> None:
    answer = found(model, {"input_ids": ids(5)})
    assert answer.correlation[0].isnan().all()
    assert not answer.heads


@pytest.mark.parametrize(("field", "bad"), [("far", 0), ("rows", 0), ("high", 1.0)])
def test_says_what_is_wrong(field: str, bad: float) -> None:
    with pytest.raises(FieldError, match=field):
        PositionalHeads(**{field: bad})


def test_heads_from_the_threshold_on_the_highest_first() -> None:
    rows = {0: torch.tensor([0.5, 0.25]), 2: torch.tensor([0.75, 1.0])}
    assert list(Positional(rows, {}, 0.5).heads.items()) == [((2, 1), 1.0), ((2, 0), 0.75), ((0, 0), 0.5)]


def test_each_text_counts_alike_whatever_its_batch(model) -> None:
    texts = [ids(24, seed) for seed in (1, 2, 3)]
    apart = found(model, *({"input_ids": x} for x in texts))
    batches = found(model, {"input_ids": torch.cat(texts[:2])}, {"input_ids": texts[2]})
    for n in apart.share:
        assert close_model(batches.correlation[n].float(), apart.correlation[n].float())
        assert close_model(batches.share[n].float(), apart.share[n].float())
