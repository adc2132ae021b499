"""How the GPU's kernels are called: strides, grids, cards and block sizes that an interpreter alone would not mind."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from .kernel_calls import DEVICE, interpreting


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreting(monkeypatch)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_lines_that_lie_far_apart(axis: int) -> None:
    """Further than 32 bits count; memory that nobody touches costs nothing."""
    from heedful.gpu.launch import Problem, attend

    shape, step = (3, 3, 4, 16), 2**30 + 64
    q, k, v = (torch.randn(shape).half().to(DEVICE) for _ in range(3))
    strides = [192, 64, 16, 1]
    strides[axis] = step
    far = (
        torch.empty(step * (shape[axis] - 1) + 640, dtype=torch.float16, device=DEVICE)
        .as_strided(shape, strides)
        .copy_(k)
    )
    ranges = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE).expand(1, 1, 4, 1, 2).contiguous()
    first = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    found, want = (attend(Problem(q, x, v, ranges, 0.25, received=True, first_at=first)) for x in (far, k))
    assert torch.equal(found.out, want.out)
    assert same(found.received, want.received)
    assert same(found.first, want.first)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels that are called and their grids; none is run."""
    from heedful.gpu import launch

    found: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(launch, "_call", lambda kernel, grid, *_, **__: found.append((kernel.fn.__name__, grid)))
    return found


def test_many_texts_fit_the_grid_of_a_card(launched: list[tuple[str, tuple[int, ...]]]) -> None:
    """Its second and third axis end at 65,535, which the windows of a batch of images go beyond."""
    from heedful.gpu.launch import Problem, Pulled, Step, attend, pull, step

    texts = 70_000
    q, k, v = (torch.zeros(1, 1, 2, 1, device=DEVICE).expand(texts, -1, -1, -1) for _ in range(3))
    ranges = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE).expand(1, 1, 2, 1, 2)
    bias = torch.zeros(texts, 1, 2, 2, device=DEVICE)
    p = Problem(q, k, v, ranges, 1.0, bias=bias, received=True, reach=2)
    answer = attend(p)
    pull(p, Pulled(answer.out, answer.lse, answer.out, answer.received), to_bias=True)
    attend(Problem(q, k, v, ranges, 1.0, form="relu"))
    ends = torch.zeros(texts, 1, 2, dtype=torch.int32, device=DEVICE)
    step(Step(q[:, :, :1], k, v, ends, 1.0, keys=2, longest=2))
    assert len(launched) == 9
    for name, grid in launched:
        assert grid[0] >= texts, name
        assert all(x <= 65_535 for x in grid[1:]), name


def test_kernels_run_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current card, which is another for some layers of a model under a `device_map`."""
    from heedful.gpu.launch import Problem, attend

    entered: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or nullcontext())
    q = torch.ones(1, 1, 2, 16, device=DEVICE)
    ranges = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE).expand(1, 1, 2, 1, 2)
    attend(Problem(q, q, q, ranges, 1.0, received=True, reach=2))
    assert [x.data_ptr() for x in entered] == [q.data_ptr()] * 3


def test_a_call_that_asks_for_more_than_fits_beside_measured_sizes_takes_safe_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.errors import OutOfResources

    from heedful.gpu import blocks, launch

    monkeypatch.setattr(blocks, "table", lambda: {"": {blocks.ROWS: {"128": [128, 128, 8, 3]}}})
    monkeypatch.setattr(blocks, "architecture", lambda device: "")

    q = torch.zeros(1, 1, 16, 128, dtype=torch.bfloat16)
    ranges = torch.zeros(1, 1, 16, 1, 2, dtype=torch.int32)
    tried = []

    def call(kernel: object, grid: object, *args: object, **sizes: int) -> None:
        tried.append(sizes["BN"])
        if sizes["BN"] > room:
            raise OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(launch, "_call", call)
    room = 128
    launch.attend(launch.Problem(q, q, q, ranges, 1.0))
    assert tried == [128]
    room = 32
    launch.attend(launch.Problem(q, q, q, ranges, 1.0))
    assert tried == [128, 128, blocks.safe(128).keys]
    room = 0
    with pytest.raises(OutOfResources):
        launch.attend(launch.Problem(q, q, q, ranges, 1.0))


def test_ranges_may_stand_for_all_rows_at_once() -> None:
    """Rows that share one pair of numbers in memory: nothing beyond these is read."""
    from heedful.gpu.launch import Problem, attend

    q, v = torch.zeros(1, 1, 3, 16, device=DEVICE), torch.arange(8.0, device=DEVICE).expand(1, 1, 16, -1).mT
    among = torch.tensor([[0, 2], [5, 8], [7, 8]], dtype=torch.int32, device=DEVICE)  # the last two are none of theirs
    k = torch.zeros(1, 1, 8, 16, device=DEVICE)
    answer = attend(Problem(q, k, v, among[:1].expand(1, 1, 3, -1, -1), 1.0))
    assert answer.out[0, 0, :, 0].tolist() == [0.5] * 3
