"""One query after a cache through the GPU's kernel, in triton's interpreter, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close, close_model, within_budget
from heedful.core.errors import BackendError
from heedful.core.mask import Blocks, First, Rule, Where, Window
from heedful.core.positions import Positions
from heedful.core.ragged import Ragged, padded
from heedful.core.summary import Summary
from heedful.gpu import blocks
from heedful.kit.chosen import Chosen
from heedful.methods import SnapKV
from heedful.tiny import tiny

from .kernel_calls import CAUSAL, DEVICE, Everything, Halved, Same, a_bias, a_call, compare, draw, interpreting, run
from .test_native_flat import Columns, flat_step

SHAPES = [(2, 4, 2, 1, 40, 16, 16), (1, 6, 1, 1, 300, 10, 6), (1, 3, 3, 1, 7, 64, 64)]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreting(monkeypatch)


def chosen(shape: tuple[int, ...], heads: int, texts: int = 1, seed: int = 0) -> Chosen:
    """Every other key or so, other ones for each head."""
    picked = torch.rand(texts, heads, 1, shape[4], generator=torch.Generator().manual_seed(seed)) < 0.5
    spread = picked.repeat_interleave(shape[1] // heads, 1)
    return Chosen(lambda rows: spread)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernel for one query was asked."""
    from heedful.gpu import launch

    asked: list[Any] = []
    plain = launch.step
    monkeypatch.setattr(launch, "step", lambda p: asked.append(p) or plain(p))
    return asked


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["one", "key", "query"])
def test_keys_chosen_one_by_one(shape: tuple[int, ...], kind: str, steps: list[Any]) -> None:
    heads = {"one": 1, "key": shape[2], "query": shape[1]}[kind]
    compare("triton", shape, (*CAUSAL, chosen(shape, heads, shape[0])))
    (step,) = steps
    assert step.places is not None
    assert step.ends.shape[1] == (shape[1] if kind == "query" else shape[2])
    assert step.places.shape[2] < shape[4]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_in_a_row(shape: tuple[int, ...], steps: list[Any]) -> None:
    for rules in ((), CAUSAL, (*CAUSAL, Window(5))):
        compare("triton", shape, rules, sink=torch.linspace(-1, 4, shape[1]).view(1, -1, 1, 1))
    assert [step.places for step in steps] == [None] * 3


@pytest.mark.parametrize("rules", [CAUSAL, (*CAUSAL, chosen((1, 71, 1, 1, 20, 8, 8), 1))], ids=["row", "chosen"])
def test_more_heads_than_a_tile_has_share_their_keys(rules: tuple[Rule, ...], steps: list[Any]) -> None:
    """As Falcon's 71 do."""
    shape = (1, 71, 1, 1, 20, 8, 8)
    assert blocks.tiles(blocks.STEP, shape[5], shape[1], torch.empty(0, device=DEVICE)).rows < shape[1]
    compare("triton", shape, rules)
    assert steps[0].ends.shape[1] == 1


def test_several_stretches_are_read_as_they_are(steps: list[Any]) -> None:
    compare("triton", SHAPES[0], (*CAUSAL, Window(5) | First(2)))
    assert not steps


def test_a_table_of_blocks_of_any_width() -> None:
    table = torch.rand(1, 2, 1, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    compare("triton", SHAPES[0], (*CAUSAL, Blocks(table, 8)))


@pytest.mark.parametrize("rules", [CAUSAL, (*CAUSAL, chosen(SHAPES[0], 2))], ids=["row", "chosen"])
def test_caps_biases_sinks_and_padding(rules: tuple[Rule, ...]) -> None:
    shape = SHAPES[0]
    compare(
        "triton", shape, rules, pad=torch.tensor([0, 7]), softcap=5.0, bias=a_bias(shape, (True, True, False)),
        sink=torch.linspace(-1, 4, 4).view(1, 4, 1, 1),
    )  # fmt: skip


def test_a_query_that_is_no_text_counts_nowhere() -> None:
    shape = (2, 4, 2, 1, 20, 16, 16)
    call = replace(a_call(shape, CAUSAL), queries=Positions.row(19, 1, is_filled=torch.tensor([[[True]], [[False]]])))
    found: dict[str, list[Summary]] = {"triton": [], "reference": []}
    for name, told in found.items():
        run(name, Everything(told), *draw(shape), call)
    for part in ("received", "seen", "distance"):
        assert close(*(getattr(told[0], part).cpu() for told in found.values())), part


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("picks", [False, True])
@pytest.mark.parametrize("counts", [(40, 9, 0, 7), (3, 150, 150, 149), (0, 0, 3, 0)], ids=str)
def test_uneven_heads_are_read_where_they_lie(
    counts: tuple[int, ...], picks: bool, heads: tuple[int, int], steps: list[Any]
) -> None:
    q, k, v, call = flat_step(counts, heads)
    if picks:
        call = replace(call, mask=call.mask & chosen((2, heads[0], 2, 1, max(counts)), heads[0], 2))
    told: list[Summary] = []
    found = run("triton", Columns(told), q, k, v, call)
    assert isinstance(k, Ragged)
    assert isinstance(v, Ragged)
    assert k._whole is None, "nothing was padded"
    assert v._whole is None
    assert steps[0].base is not None
    want: list[Summary] = []
    wide = [padded(x).double() for x in (q, k, v)]
    assert within_budget(found, run("reference", Same(), q, k, v, call), run("reference", Columns(want), *wide, call))
    for part in ("received", "entropy", "peak"):
        assert close(getattr(told[0], part).cpu(), getattr(want[0], part).float()), part


def test_a_head_that_sees_nothing_gets_nothing() -> None:
    shape = SHAPES[0]
    picked = torch.ones(1, 4, 1, 40, dtype=torch.bool)
    picked[:, 1] = False
    compare("triton", shape, (*CAUSAL, Chosen(lambda rows: picked)))
    found = run("triton", Same(), *draw(shape), a_call(shape, (Chosen(lambda rows: picked),)))
    assert not bool(found[:, 1].any())
    assert bool(found[:, 0].all())


def test_many_keys_are_split_among_programs() -> None:
    shape = (1, 4, 2, 1, 2 * blocks.LEAST + 44, 16, 16)
    assert blocks.span(shape[4], 2) < shape[4]
    blind = Where(lambda q, k: k < 0)
    for sink in (None, torch.randn(1, 4, 1, 1)):
        for rules in (CAUSAL, (*CAUSAL, chosen(shape, 4)), (*CAUSAL, Window(50)), (*CAUSAL, blind)):
            compare("triton", shape, rules, sink=sink)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU does silently
def test_what_is_not_chosen_may_hold_anything() -> None:
    shape = SHAPES[0]
    q, k, v = draw(shape)
    rule = chosen(shape, 1)
    picked = rule.pick(slice(0, 1))[0, 0, 0]
    before = run("triton", Same(), q, k, v, a_call(shape, (rule,)))
    k[:, :, ~picked] = v[:, :, ~picked] = float("nan")
    assert torch.equal(run("triton", Same(), q, k, v, a_call(shape, (rule,))), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    shape = (1, 4, 2, 1, 60, 32, 32)
    q, k, v = (x.to(dtype) for x in draw(shape))
    call = a_call(shape, (*CAUSAL, chosen(shape, 2)))
    found, exact = (
        run("triton", Same(), q, k, v, call),
        run("reference", Same(), q.double(), k.double(), v.double(), call),
    )
    assert found.dtype == dtype
    assert close(found, exact.to(dtype), 4.0)


def test_weight_is_moved_of_one_query_too() -> None:
    shape = SHAPES[0]
    found, want = (run(name, Halved(), *draw(shape), a_call(shape, CAUSAL)) for name in ("triton", "reference"))
    assert close(found, want)


def test_one_query_may_learn() -> None:
    """Along the kernel for many, and not where its keys are chosen one by one."""
    shape = SHAPES[0]
    q, k, v = (x.requires_grad_() for x in draw(shape))
    run("triton", Same(), q, k, v, a_call(shape, CAUSAL)).sum().backward()
    assert q.grad is not None
    with pytest.raises(BackendError, match="separate stretches"):
        run("triton", Same(), q, k, v, a_call(shape, (chosen(shape, 2),)))


def test_a_model_goes_on_from_an_uneven_cache_as_without_the_kernel(steps: list[Any]) -> None:
    model = tiny().to(DEVICE)
    ids = torch.randint(3, 99, (1, 30), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def told(backend: str) -> Tensor:
        with torch.no_grad(), attach(model, SnapKV(budget=12), backend=backend) as heard:
            out = heard(input_ids=ids, use_cache=True)
            return torch.cat([
                heard(input_ids=ids[:, i : i + 1], use_cache=True, **{CACHE: cache_of(out)}).logits
                for i in range(3)
            ])  # fmt: skip

    assert close_model(told("triton"), told("reference"))
    assert steps
