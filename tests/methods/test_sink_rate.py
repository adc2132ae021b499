"""Sink rate against dense maps, with padding on either side, in tiles, and where it must keep silent."""

from functools import partial

import pytest
import torch

import heedful
from heedful import catalogue, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, StatisticError
from heedful.core.stats import load, merged
from heedful.methods.observe.sink_rate import Columns, SinkRate, Sinks, _curves, _finding
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from tests import readers
from tests.readers import ids, padded

EPSILON = 0.12  # low enough that some heads of a tiny random model have sinks and some have none
found = partial(readers.found, method=SinkRate(EPSILON))


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3)


def same(a: Sinks, b: Sinks) -> bool:
    rates = all(torch.equal(a.rate[n].nan_to_num(), b.rate[n].nan_to_num()) for n in b.rate)
    return rates and all(close_model(a.importance[n].float(), b.importance[n].float()) for n in b.rate)


def test_is_the_formula_of_the_paper() -> None:
    eager = models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")
    inputs = models.tiny_inputs(eager, batch=4, length=20)
    with torch.no_grad():
        maps = torch.stack(eager(**inputs, output_attentions=True).attentions).double()  # [l b h q k]
    alpha = maps.sum(-2) / torch.arange(20, 0, -1)
    sinks = found(eager, inputs)
    wanted = (alpha > EPSILON).double().mean(1)
    assert 0 < wanted.mean() < 1
    for layer in range(3):
        assert torch.equal(sinks.rate[layer], wanted[layer])
        assert close(sinks.importance[layer].float(), alpha[layer].mean(0).float())
    assert close(sinks.by_position, wanted.mean((0, 1)))
    assert sinks.first == pytest.approx(float(wanted[..., 0].mean()))
    assert sinks.by_layer(2) == pytest.approx({n: float(wanted[n, :, 2].mean()) for n in range(3)})


def test_epsilon_is_exclusive(model) -> None:
    # a text of one token gives its only key the weight one, which no epsilon below one hides
    only = {"input_ids": ids(1)}
    assert found(model, only, method=SinkRate(0.999)).first == 1.0
    alpha = found(model, {"input_ids": ids(9)}).importance[0]
    edge = float(alpha[0, 0])
    assert found(model, {"input_ids": ids(9)}, method=SinkRate(edge)).rate[0][0, 0] == 0.0


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, padded(short, long, left))
    assert same(together, apart)
    assert together.rate[0].shape == (4, 17)


@pytest.mark.parametrize("kind", ["llama", "mistral", "bert", "gpt2"])
def test_tiles_do_not_matter(kind: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model, length=23)
    whole = found(model, inputs, backend="reference")
    for rows in (1, 5, 23):
        assert same(found(model, inputs, tile_rows=rows, backend="tiled"), whole)


def test_only_rows_that_see_a_key_count(model) -> None:
    inputs = {"input_ids": ids(20)}
    stack = SinkWindow(0, 1) | SinkRate(0.999)
    with heedful.attach(model, stack) as run, torch.no_grad():
        run(**inputs)
    assert run[SinkRate(0.999)].first == 1.0  # each row sees itself alone, with weight one


def test_batches_merge_and_come_back_from_disk(model, tmp_path) -> None:
    batches = [{"input_ids": ids(n, n)} for n in (5, 9, 13)]
    whole = found(model, *batches)
    files = []
    for i, batch in enumerate(batches):
        with heedful.attach(model, SinkRate(EPSILON)) as run:
            run(**batch)
        files.append(run.save(tmp_path / f"{i}.safetensors"))
    with heedful.attach(model, SinkRate(EPSILON)) as run:
        for file in reversed(files):
            run.merge(file)
    assert same(run[SinkRate(EPSILON)], whole)
    parts = [load(file)["0.weigh_keys.1"] for file in files]
    assert close(merged(parts).value[0], whole.rate[1])


def test_heads_and_layers(model) -> None:
    inputs = {"input_ids": ids(15)}
    some = SinkRate(EPSILON).on(layers=[1, 2], heads=[0, 3])
    with heedful.attach(model, some) as run, torch.no_grad():
        run(**inputs)
    whole = found(model, inputs)
    assert list(run[some].rate) == [1, 2]
    assert torch.equal(run[some].rate[1], whole.rate[1][[0, 3]])


def test_decoding_steps_are_not_counted(model) -> None:
    with heedful.attach(model, SinkRate(EPSILON)) as run:
        run.generate(input_ids=ids(9), max_new_tokens=4, do_sample=False)
    assert same(run[SinkRate(EPSILON)], found(model, {"input_ids": ids(9)}))


def test_cross_attention_counts_the_keys_of_the_other_text() -> None:
    model = models.tiny("t5")
    inputs = models.tiny_inputs(model, length=8)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :5]
    shapes = {tuple(x.shape) for x in found(model, inputs).rate.values()}
    assert shapes == {(4, 8), (4, 5)}
    assert found(model, inputs).by_position.shape == (8,)


def test_changes_nothing_and_keeps_no_graph(model) -> None:
    inputs = {"input_ids": ids(12)}
    with heedful.attach(model, SinkRate(EPSILON)) as run:
        out = run(**inputs).logits
        assert run.activity().active
    assert close_model(out, model(**inputs).logits)
    assert not any(x.requires_grad for s in run.state.statistics.values() for x in s.tensors().values())
    assert "first-token sink rate" in str(run[SinkRate(EPSILON)])


def test_says_what_is_wrong(model) -> None:
    for bad in (-0.1, 1.0):
        with pytest.raises(FieldError, match=r"epsilon = .*0 or more, and below 1"):
            SinkRate(bad)
    with heedful.attach(model, SinkRate()) as run, pytest.raises(StatisticError, match="read nothing yet"):
        run[SinkRate()]


def test_tells_what_a_reader_wants_to_know() -> None:
    alpha = torch.full((4, 3), 0.1)
    high = alpha.clone()
    high[1:, 0] = torch.tensor([0.5, 0.9, 0.6])
    importance = {0: alpha, 1: alpha, 2: high, 5: high}
    rate = {n: (x > 0.3).double() for n, x in importance.items()}
    told = SinkRate().describe(Sinks(rate, importance))
    weights, often, curves = told.figures
    assert weights.layers == [0, 1, 2, 5]
    assert torch.equal(weights.values, torch.stack([x[:, 0] for x in importance.values()]))
    assert often.values.sum() == 6
    assert list(curves.x) == [1, 2, 3]
    assert list(curves.lines) == ["layers 0 to 1", "layer 2", "layer 5"]
    assert curves.lines["layer 5"][0] == pytest.approx(2.1 / 4)
    (role,), (finding,) = told.roles, told.findings
    assert list(role.heads) == [(2, 2), (5, 2), (2, 3), (5, 3), (2, 1), (5, 1)]
    assert role.heads[5, 2] == pytest.approx(0.9)
    assert "38% of heads have an attention sink, the first token, which gets more than 30%" in finding.text
    assert "from layer 2 on 75% do" in finding.text
    assert set(finding.methods) <= set(catalogue.entries())


def test_tells_of_no_sinks_and_of_layers_of_unlike_width() -> None:
    importance = {0: torch.full((4, 3), 0.1), 1: torch.full((2, 5), 0.1)}
    told = SinkRate().describe(Sinks({n: 0 * x for n, x in importance.items()}, importance))
    assert told.figures[0].values.isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert told.roles[0].heads == {}
    assert told.findings[0].text.startswith("No attention sink: no head gives the first token more than 30%")
    strong = SinkRate().describe(Sinks({n: 0 * x + 1 for n, x in importance.items()}, importance)).findings[0]
    assert (told.findings[0].weight, strong.weight) == (0.1, 0.9)  # a finding of nothing stands below all others
    assert told.findings[0].methods == ()


def test_half_of_a_layers_heads_are_enough_to_name_it() -> None:
    rate = torch.tensor([[0.2, 0.5], [0.9, 0.1], [0.9, 0.8]])
    assert "from layer 4 on 75% do" in _finding(rate, [3, 4, 7], "0.3").text


def test_positions_are_drawn_on_logarithms_and_far_ones_together() -> None:
    draw = torch.Generator().manual_seed(0)
    importance = {n: torch.rand(3, 30, generator=draw) for n in range(2)}
    curves = _curves(importance)
    assert curves.log_x
    assert curves.log_y
    assert list(curves.x) == [*range(1, 18), 24]  # places 0 to 15, then 16 to 22 and 23 to 29
    for n, line in enumerate(curves.lines.values()):
        wanted = importance[n].mean(0)
        assert close(line[:16], wanted[:16])
        assert close(line[16:], torch.stack([wanted[16:23].mean(), wanted[23:].mean()]))


def test_heads_are_told_apart_up_to_a_place(model) -> None:
    texts = [{"input_ids": ids(n, n)} for n in (3, 9, 12)]
    whole, some = found(model, *texts), found(model, *texts, method=SinkRate(EPSILON, places=5))
    for n in whole.rate:
        for mine, wanted in ((some.rate[n], whole.rate[n]), (some.importance[n], whole.importance[n])):
            assert close(mine[:, :5], wanted[:, :5])
            assert close(mine[:, 5:], wanted[:, 5:].mean(0).expand(4, -1))
    assert close(some.by_position, whole.by_position)
    columns = Columns.of(torch.rand(2, 4, 12, dtype=torch.float64), torch.ones(4, 12), 5)
    for x in columns.tensors().values():
        assert x.untyped_storage().nbytes() == x.nbytes, "positions that are told together are not held one by one"
    with pytest.raises(FieldError, match=r"places = 0: .*1 or more, or None"):
        SinkRate(places=0)


def test_where_the_first_layer_parks_no_later_one_is_named() -> None:
    rate = torch.tensor([[0.9, 0.8], [0.1, 0.2], [0.9, 0.8]])
    assert "from layer" not in _finding(rate, [0, 1, 2], "0.3").text


def test_where_all_places_are_early_none_is_later() -> None:
    found = Columns.of(torch.ones(2, 3, 5), torch.ones(3, 5), None)
    assert (found.early.shape, found.later.shape, found.later_count.shape) == ((2, 3, 5), (2, 0), (2, 0))


def test_a_finding_weighs_as_much_as_heads_park() -> None:
    for rate, weight in ((torch.zeros(2, 2), 0.1), (torch.eye(2), 0.7), (torch.ones(2, 2), 0.9)):
        assert _finding(rate, [0, 1], "0.3").weight == weight
