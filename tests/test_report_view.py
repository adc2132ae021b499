"""The token view as the page's script reads it."""

from __future__ import annotations

import gzip
from base64 import b64decode
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.report import data
from tests.test_report import FakeView, text_view


def unpacked(about: dict[str, Any], numbers: str) -> dict[str, Tensor]:
    """What the page's script makes of a packed view."""
    raw = gzip.decompress(b64decode(numbers))
    h, n, t = len(about["heads"]), len(about["tokens"]), about["top"]
    wide = torch.int32 if about["wide"] else torch.int16
    sizes = [h * n * t * wide.itemsize, h * n * 2, h * n * 2, h * n * 2, h * n * t]
    ends = [0, *(sum(sizes[: i + 1]) for i in range(5)), len(raw)]
    kinds = (wide, torch.uint16, torch.uint16, torch.uint16, torch.uint8, torch.uint8)
    back, logs, entropy, norms, weights, opening = (
        torch.frombuffer(bytearray(raw[ends[i] : ends[i + 1]]), dtype=kind) for i, kind in enumerate(kinds)
    )
    size = about["opening"]
    return {
        "keys": torch.arange(n)[:, None] - back.view(h, n, t),
        "weights": weights.view(h, n, t) / 255,
        "received": 10 ** ((logs.double().view(h, n) / 65535 - 1) * about["decades"]),
        "entropy": entropy.double().view(h, n) / 65535 * about["widest"],
        "norms": norms.double().view(h, n) / 65535 * about["longest"],
        "opening": (opening.double().view(len(about["layers"]), about["across"], size, size) / 255) ** 2,
    }


@pytest.mark.parametrize("n", [50, 40_000])
def test_a_packed_view_unpacks(n: int) -> None:
    view = text_view(n, [(14, 3), (3, 1)], 3)
    view.keys[0, 10, 1] = n - 1  # ahead, as in an encoder, and far: more than 16 bits hold in the long text
    view.weights[0, 10, 1] = 0.5
    about, numbers = data.packed(view)
    found = unpacked(about, numbers)
    assert about["wide"] == (n > 32768)
    held = found["weights"] > 0
    assert bool((found["keys"] == view.keys)[held].all())
    assert float((found["weights"] - view.weights).abs().max()) <= 0.5 / 255 + 1e-6
    assert float((found["received"] / view.received - 1).abs().max()) < 2e-4
    assert float((found["entropy"] - view.entropy).abs().max()) < 4 / 65535
    assert float((found["norms"] - view.norms).abs().max()) < 8 / 65535
    assert torch.equal(found["opening"].float(), view.opening)
    assert about["heads"] == ["14.3", "3.1"]


def test_a_packed_view_drops_keys_that_are_not_there() -> None:
    keys, rows = torch.tensor([[[0, -1], [1, 7]]], dtype=torch.int32), torch.ones(1, 2)
    weights, opening = torch.tensor([[[1.0, 0.4], [0.6, 0.4]]]), torch.full((1, 1, 2, 2), torch.nan)
    view = FakeView(["a", "b"], [(0, 0)], keys, weights, rows, rows, 0 * rows, [0], opening)
    found = unpacked(*data.packed(view))
    assert found["weights"][0, :, 1].tolist() == [0, 0]
    assert not found["norms"].any()
    assert not found["opening"].any()  # of heads that a layer does not have
