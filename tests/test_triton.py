"""The GPU's kernels in triton's interpreter, against the reference."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful import gpu
from heedful.conformance.tolerances import close, error
from heedful.core.errors import BackendError
from heedful.core.mask import Blocks, First, Rule, Where, Window
from heedful.core.positions import Positions
from heedful.core.summary import Summary
from heedful.engine.needs import Needs
from heedful.engine.select import explain, select
from heedful.methods import SinkRate, TempScale

from .kernel_calls import (
    BIASES,
    CAUSAL,
    DEVICE,
    RULES,
    Everything,
    Halved,
    Same,
    a_bias,
    a_call,
    compare,
    draw,
    interpreting,
    run,
)

SMALL = [
    (2, 4, 2, 19, 19, 8, 8),
    (2, 4, 1, 50, 50, 10, 6),
    (1, 1, 1, 1, 1, 4, 4),
    (1, 6, 2, 1, 50, 64, 64),
    (1, 4, 2, 7, 90, 80, 80),
]
LARGE = [
    (1, 6, 6, 33, 33, 1, 3),
    (1, 2, 2, 200, 200, 16, 256),
    (1, 5, 1, 1, 1100, 20, 33),
    (1, 7, 1, 129, 129, 128, 128),
]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreting(monkeypatch)


def _of_both(small: list[object], large: list[object]) -> list[object]:
    return [*small, *(pytest.param(x, marks=pytest.mark.slow) for x in large)]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", _of_both([*SMALL], [*LARGE]), ids=str)
def test_it_agrees_with_the_reference(shape: tuple[int, ...], rules: tuple[Rule, ...]) -> None:
    compare("triton", shape, rules)


@pytest.mark.parametrize("n", [40, 3, 1])
def test_padding_on_the_left(n: int) -> None:
    compare("triton", (2, 4, 2, n, 40, 16, 16), (*CAUSAL, Window(9) | First(2)), pad=torch.tensor([0, 7]))


def test_queries_that_are_no_text_count_nowhere() -> None:
    """Of each text its own: where padding stands behind a text, its queries see keys, and must not be counted."""
    shape = (2, 4, 2, 20, 20, 16, 16)
    is_text = torch.arange(20)[None, None] < torch.tensor([20, 14])[:, None, None]
    call = replace(a_call(shape, CAUSAL), queries=Positions.row(0, 20, is_filled=is_text))
    found: dict[str, list[Summary]] = {"triton": [], "reference": []}
    for name, told in found.items():
        run(name, Everything(told), *draw(shape), call)
    for part in ("received", "seen", "distance"):
        assert close(*(getattr(told[0], part).cpu() for told in found.values())), part


@pytest.mark.parametrize("heads", _of_both([2], [1, 4]))
@pytest.mark.parametrize("size", _of_both([64], [128]))
def test_block_tables(heads: int, size: int) -> None:
    made = torch.Generator().manual_seed(1)
    count = -(-150 // size)
    table = torch.rand(1, heads, count, count, generator=made) < 0.4
    compare("triton", (1, 4, 2, 150, 150, 16, 16), (*CAUSAL, Blocks(table, size)))


@pytest.mark.parametrize("n", [20, 1])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_sink_logits(n: int, size: float) -> None:
    sink = size * torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(2))
    compare("triton", (1, 4, 2, n, 20, 16, 16), CAUSAL, sink=sink)


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_sinks_of_each_row_are_left_to_tiles(backend: str) -> None:
    shape = (1, 4, 2, 20, 20, 16, 16)
    sink = torch.randn(1, 4, 20, 1)
    with pytest.raises(BackendError, match="a sink logit for each row"):
        run(backend, Same(), *draw(shape), a_call(shape, CAUSAL), sink=sink)
    found, want = (run(name, Same(), *draw(shape), a_call(shape, CAUSAL), sink=sink) for name in ("auto", "reference"))
    assert close(found, want)


@pytest.mark.parametrize("softcap", [5.0, 20.0])
def test_soft_caps(softcap: float) -> None:
    compare("triton", (1, 4, 2, 20, 40, 16, 16), CAUSAL, softcap=softcap)


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_biases(biases: tuple[bool, ...], softcap: float | None) -> None:
    shape = (2, 4, 2, 20, 40, 16, 16)
    compare("triton", shape, CAUSAL, softcap=softcap, bias=a_bias(shape, biases))


@pytest.mark.parametrize("n", [1, 50])
def test_a_bias_of_one_layout_or_another(n: int) -> None:
    bias = torch.randn(1, 50, 4, n, generator=torch.Generator().manual_seed(4)).permute(0, 2, 3, 1)
    compare("triton", (1, 4, 1, n, 50, 10, 6), (*CAUSAL, Window(30)), bias=bias)
    compare("triton", (1, 4, 1, n, 50, 10, 6), CAUSAL, pad=torch.tensor([7]), bias=bias[:, :1])


def test_weight_is_moved_under_a_bias() -> None:
    shape = (1, 4, 2, 20, 40, 16, 16)
    call, bias = a_call(shape, CAUSAL), a_bias(shape, BIASES[-1])
    found, want = (run(name, Halved(), *draw(shape), call, bias=bias) for name in ("triton", "reference"))
    assert close(found, want)
    assert not close(found, run("triton", Same(), *draw(shape), call, bias=bias))


def test_weight_is_moved_under_a_soft_cap() -> None:
    shape = (1, 4, 2, 20, 40, 16, 16)
    call = replace(a_call(shape, CAUSAL), softcap=1.0)
    found, want = (run(name, Halved(), *draw(shape), call) for name in ("triton", "reference"))
    assert close(found, want)
    assert not close(found, run("triton", Same(), *draw(shape), call))


@settings(max_examples=5)
@given(
    n=st.integers(1, 90), past=st.integers(0, 40), heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (5, 5)]),
    d=st.integers(1, 70), e=st.integers(1, 70), window=st.integers(1, 100),
)  # fmt: skip
def test_any_shape_agrees(n: int, past: int, heads: tuple[int, int], d: int, e: int, window: int) -> None:
    compare("triton", (1, *heads, n, n + past, d, e), (*CAUSAL, Window(window)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [60, 1])
def test_low_precision_is_as_good_as_torch_s_own(n: int, dtype: torch.dtype) -> None:
    """Weights are rounded before they meet the values, as for all tensor cores: within twice the error of torch's."""
    shape = (2, 6, 2, n, 60, 32, 32)
    q, k, v = (x.to(dtype) for x in draw(shape))
    call = a_call(shape, CAUSAL)
    found = run("triton", Same(), q, k, v, call)
    exact = run("reference", Same(), q.double(), k.double(), v.double(), call)
    keep = torch.ones(n, 60, dtype=torch.bool).tril(60 - n)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    assert found.dtype == dtype
    assert error(found, exact) <= 2 * error(plain, exact)


def test_a_long_cache_is_split_among_programs() -> None:
    """As many spans as fit, of which some or all see nothing; and with a sink that counts once."""
    from heedful.gpu.blocks import SPAN

    shape = (1, 4, 2, 1, 2 * SPAN + 100, 16, 16)
    q, k, v = draw(shape)
    blind = Where(lambda q, k: k < 0)
    for sink in (None, torch.randn(1, 4, 1, 1)):
        for rules in (CAUSAL, (*CAUSAL, Window(50)), (*CAUSAL, blind)):
            found, want = (run(x, Same(), q, k, v, a_call(shape, rules), sink) for x in ("triton", "reference"))
            assert close(found, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets, warns of what a GPU does silently
@pytest.mark.parametrize("n", [40, 1])
def test_what_is_no_number_reaches_those_who_see_it(n: int) -> None:
    shape = (1, 2, 2, n, 40, 8, 8)
    q, k, v = draw(shape)
    k[0, 0, 20] = v[0, 1, 39, 3] = float("nan")
    q[0, 1, -1] = float("inf")
    found, want = (run(name, Same(), q, k, v, a_call(shape, CAUSAL)) for name in ("triton", "reference"))
    assert bool(found[0, 0, max(0, 20 - 40 + n) :].isnan().all())
    assert not bool(found[0, 1, -1].isfinite().any())
    clean = want.isfinite()
    assert close(found[clean], want[clean])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_of_minus_infinities_is_no_number_and_a_blind_one_is_zero() -> None:
    shape = (1, 2, 1, 9, 9, 8, 8)
    q, k, v = draw(shape)
    q[:, :, 4, 0], k[..., 0] = -float("inf"), 1.0
    rules = (*CAUSAL, Where(lambda q, k: q != 6))
    found, want = (run(name, Same(), q, k, v, a_call(shape, rules)) for name in ("triton", "reference"))
    assert bool(found[:, :, 4].isnan().all())
    assert bool((found[:, :, 6] == 0).all())
    clean = [n for n in range(9) if n != 4]
    assert close(found[:, :, clean], want[:, :, clean])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_keys_that_are_masked_may_hold_anything() -> None:
    shape = (1, 4, 2, 70, 70, 8, 8)
    q, k, v = draw(shape)
    before = run("triton", Same(), q, k, v, a_call(shape, CAUSAL))
    k[:, :, 61:], v[:, :, 61:] = 1e30, 3e38
    assert torch.equal(run("triton", Same(), q, k, v, a_call(shape, CAUSAL))[:, :, :61], before[:, :, :61])


def test_skipped_blocks_are_not_read() -> None:
    """What lies in blocks that the table leaves out cannot reach the output, not even as no number."""
    shape = (1, 2, 1, 192, 192, 8, 8)
    q, k, v = draw(shape)
    table = torch.eye(3, dtype=torch.bool)[None, None]
    k[:, :, 64:128] = v[:, :, 64:128] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the blocks that are read
        found = run("triton", Same(), q, k, v, a_call(shape, (*CAUSAL, Blocks(table, 64))))
    spoilt = found.isnan().any(-1).any(1)[0].nonzero().flatten()
    assert spoilt.tolist() == list(range(64, 128))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout": True}, "dropout is on"),
        ({"pattern": True}, "output_attentions"),
        ({"sinks_by_row": True}, "a sink logit for each row"),
        ({"map_steps": ("ACT() at PATTERN",)}, r"ACT\(\) at PATTERN needs the scores or weights"),
    ],
)
def test_what_it_cannot_serve_it_says(change: dict[str, object], reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        select("triton", Needs(**change))  # type: ignore[arg-type]


def test_calls_that_it_cannot_serve_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 4, 2, 40, 40, 8, 8)
    q, k, v = draw(shape)

    def tried(*tensors: Tensor, rules: tuple[Rule, ...] = CAUSAL) -> Tensor:
        return run("triton", Same(), *tensors, a_call(shape, rules))

    with pytest.raises(BackendError, match="too many separate stretches"):
        tried(q, k, v, rules=(*CAUSAL, Where(lambda a, b: (a - b) % 2 == 0)))
    with pytest.raises(BackendError, match="multiple of 64"):
        tried(q, k, v, rules=(*CAUSAL, Blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), 32)))
    with pytest.raises(BackendError, match="float16, bfloat16 and float32"):
        tried(q.double(), k.double(), v.double())
    with pytest.raises(BackendError, match="300 wide"):
        tried(*(x.new_zeros(*x.shape[:3], 300) for x in (q, k, v)))
    if DEVICE.type == "cpu":
        monkeypatch.delenv(gpu.INTERPRETED)
        with pytest.raises(BackendError, match="it runs on GPUs, and this call is on cpu"):
            tried(q, k, v)


def test_explain_names_it_beside_the_others() -> None:
    text = str(explain(SinkRate() | TempScale()))
    assert "triton" in text
    found = str(explain(SinkRate()))
    called = re.search("triton .*attend_rows.*, and attend_step for one query; block sizes (.*)", found)
    assert called is not None
    assert "add_columns" in called[0]
    assert called[1] == ("that are safe, and not tuned" if DEVICE.type == "cpu" else called[1])
