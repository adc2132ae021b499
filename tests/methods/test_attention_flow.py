"""Attention flow against another solver, by hand, in tiles, with padding, and where it must refuse."""

from __future__ import annotations

import networkx as nx  # torch brings it
import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.explain.attention_flow import NOTHING, AttentionFlow, _nearest, maximum_flow


def by_networkx(layers: Tensor, start: int, end: int) -> float:
    graph = nx.DiGraph()
    for at, upper, lower in layers.nonzero().tolist():
        graph.add_edge((at + 1, upper), (at, lower), capacity=float(layers[at, upper, lower]))
    if (0, end) not in graph:
        return 0.0
    return nx.maximum_flow_value(graph, (len(layers), start), (0, end))


def mixed(depth: int, n: int, seed: int, causal: bool) -> Tensor:
    scores = 3 * torch.randn(depth, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if causal:
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    return 0.5 * scores.softmax(-1) + 0.5 * torch.eye(n, dtype=torch.float64)


def all_pairs(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)


@pytest.mark.parametrize(
    ("depth", "n", "causal"), [(1, 3, False), (2, 4, True), (3, 5, False), (5, 6, True), (4, 6, False)]
)
def test_is_the_maximum_flow(depth: int, n: int, causal: bool) -> None:
    layers = mixed(depth, n, depth * n, causal)
    starts, ends = all_pairs(n)
    found = maximum_flow(layers, starts, ends)
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    assert close(found, torch.tensor([by_networkx(layers, a, b) for a, b in pairs], dtype=torch.float64))


def test_takes_flow_back_where_a_greedy_way_is_wrong() -> None:
    """The first way fills an edge that the second has no other than, so the first has to be taken back."""
    layers = torch.zeros(3, 2, 2, dtype=torch.float64)
    layers[2, 0] = torch.tensor([1.0, 1.0])
    layers[1] = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    layers[0, :, 0] = 1
    assert maximum_flow(layers, torch.tensor([0]), torch.tensor([0])).tolist() == [2.0]


def flows(model, inputs, method=None, **how) -> Tensor:
    method = method or AttentionFlow()
    with heedful.attach(model, method, **how) as run, torch.no_grad():
        run(**inputs)
    (out,) = run[method]
    return out


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("rows", [None, 3])
def test_reads_the_models_maps(kind: str, rows: int | None) -> None:
    model = models.tiny(kind, num_hidden_layers=3, attn_implementation="eager")
    inputs = models.tiny_inputs(model, length=7)
    found = flows(model, inputs, tile_rows=rows, backend="tiled" if rows else "reference")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    layers = torch.stack([0.5 * x.double().mean(1) + 0.5 * torch.eye(7) for x in maps], 1)
    for text in range(2):
        wanted = maximum_flow(layers[text], *all_pairs(7)).view(7, 7)
        assert close_model(found[text].float(), (wanted / wanted.sum(-1, keepdim=True)).float())
    assert close(found.sum(-1), torch.ones(2, 7, dtype=torch.float64))


def test_one_layer_is_the_mixed_map() -> None:
    model = models.tiny("bert", num_hidden_layers=1, attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        (weights,) = model(**inputs, output_attentions=True).attentions
    assert close(flows(model, inputs).float(), 0.5 * weights.mean(1) + 0.5 * torch.eye(12))


def test_some_rows_alone_are_those_of_all() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    inputs = models.tiny_inputs(model, length=8)
    whole, some = flows(model, inputs), flows(model, inputs, AttentionFlow(rows=(2, -1, 99)))
    assert close(some[:, [2, 7]], whole[:, [2, 7]])
    assert not some[:, [0, 1, 3, 4, 5, 6]].any()


@pytest.mark.usefixtures("poison")
def test_padding_has_no_part_in_it() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    draw = torch.Generator().manual_seed(1)
    short, long = (torch.randint(3, 127, (1, n), generator=draw) for n in (5, 8))
    for left in (True, False):
        parts = [torch.zeros(1, 3, dtype=torch.long), short]
        ids = torch.cat([torch.cat(parts if left else parts[::-1], 1), long])
        mask = (ids > 0).long()
        found = flows(model, {"input_ids": ids, "attention_mask": mask}, AttentionFlow(rows=(1, -1)))
        rows = slice(3, 8) if left else slice(0, 5)
        alone = flows(model, {"input_ids": short}, AttentionFlow(rows=(1, -1)))
        assert close_model(found[:1, rows, :5].float(), alone.float())
        assert not found[0, :, 5:].any()
        assert close_model(found[1:].float(), flows(model, {"input_ids": long}, AttentionFlow(rows=(1, -1))).float())


def test_of_a_row_that_is_all_padding_nothing_flows() -> None:
    ids = torch.arange(3, 9)[None]
    mask = torch.tensor([[0] * 6, [1] * 6])
    found = flows(models.tiny("llama", num_hidden_layers=2), {"input_ids": ids.repeat(2, 1), "attention_mask": mask})
    assert not found[0].any()
    assert found[1].any()


def test_says_what_is_wrong() -> None:
    with pytest.raises(FieldError, match="one or more unlike positions"):
        AttentionFlow(rows=(1, 1))
    model = models.tiny("llama", num_hidden_layers=4)
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True)[CACHE]
    for method, more, match in (
        (AttentionFlow(), {CACHE: cache}, "comes in pieces"),
        (AttentionFlow().on(layers=[0, 2, 3]), {}, "without a gap"),
    ):
        run = heedful.attach(model, method)
        with run, torch.no_grad(), pytest.raises(FieldError, match=match):
            run(input_ids=ids, **more)


def test_rows_that_do_not_sum_to_one_are_normalised() -> None:
    """Learned sink logits take a share of every row, which capacities must not lose."""
    model = models.tiny("gpt_oss", num_hidden_layers=2, attn_implementation="eager")
    inputs = models.tiny_inputs(model, batch=1, length=6)
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True).attentions, 1)[0].double().mean(1)
    assert float(maps.sum(-1).max()) < 0.99
    layers = (maps + torch.eye(6)) / (maps.sum(-1, keepdim=True) + 1)
    wanted = maximum_flow(layers, *all_pairs(6)).view(6, 6)
    assert close_model(flows(model, inputs)[0].float(), (wanted / wanted.sum(-1, keepdim=True)).float())


def test_what_comes_from_rounding_is_no_way() -> None:
    room = torch.tensor([[[NOTHING, 0.0], [2 * NOTHING, 1.0]]], dtype=torch.float64)
    found = _nearest(room, torch.tensor([[0.0, 5.0]], dtype=torch.float64))
    assert found.tolist() == [[float("inf"), 1.0]]
