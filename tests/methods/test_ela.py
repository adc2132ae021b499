"""ELA against rows, columns and groups in loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, Layer, Mask
from heedful.core.errors import FieldError, SiteError
from heedful.methods import ELA
from tests.images_by_hand import agree, image_call, image_of, learns_of_an_image, tokens_of

E = 6


def _gate(means: list[Tensor], p: dict[str, Tensor], groups: int) -> list[Tensor]:
    """Of the means `[e]` along an axis: convolved, normed over a group's channels and places, squashed."""
    kernel = p["kernel"]
    e, together, width = kernel.shape
    found = torch.zeros(len(means), e, dtype=torch.float64)
    rows = []
    for i in range(len(means)):
        row = []
        for c in range(e):
            total = found[i, c]
            for j in range(together):
                for k in range(width):
                    if 0 <= i + k - width // 2 < len(means):
                        total = total + kernel[c, j, k] * means[i + k - width // 2][c // together * together + j]
            row.append(total)
        rows.append(torch.stack(row))
    x = torch.stack(rows)  # [places e]
    out = []
    for g in range(groups):
        part = x[:, g * e // groups : (g + 1) * e // groups]
        mean = part.sum() / part.numel()
        out.append((part - mean) / (((part - mean) ** 2).sum() / part.numel() + 1e-5) ** 0.5)
    normed = torch.cat(out, 1) * p["norm"] + p["bias"]
    return list(1 / (1 + torch.exp(-normed)))


@pytest.mark.parametrize(("kernel", "groups", "together"), [(3, 2, 1), (5, 3, 3), (1, 1, 2)])
@pytest.mark.parametrize(("grid", "before", "after"), [((2, 3), 1, 0), ((4, 3), 0, 2)])
def test_rows_and_columns_gate(
    grid: tuple[int, int], before: int, after: int, kernel: int, groups: int, together: int
) -> None:
    method, (high, wide) = ELA(kernel, groups, together), grid
    call, x = image_call(method, grid, before, after, E)

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        image = image_of(tokens, grid, before)
        rows = _gate([sum(image[y, c] for c in range(wide)) / wide for y in range(high)], p, groups)
        columns = _gate([sum(image[r, c] for r in range(high)) / high for c in range(wide)], p, groups)
        return tokens_of({(y, c): image[y, c] * rows[y] * columns[c] for y, c in image}, tokens, before)

    agree(method.gate, by_hand, call, x)


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(ELA.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=400)
    before = torch.get_rng_state()
    found, again = (ELA(5, together=4).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "kernel": (400, 4, 5), "norm": (400,), "bias": (400,),
    }  # fmt: skip
    assert torch.equal(found["kernel"], again["kernel"])
    assert not torch.equal(found["kernel"], ELA(5, together=4).parameters(replace(layer, number=0))["kernel"])
    assert found["norm"].tolist() == [1.0] * 400
    assert found["bias"].tolist() == [0.0] * 400


def test_what_cannot_be() -> None:
    assert ELA() == ELA(7, 16, 1)
    assert ELA.example() == ELA(3, 4)
    assert ELA(1, 1, 1).groups == 1
    for kernel in (0, -1, 4):
        with pytest.raises(FieldError, match=rf"kernel = {kernel}: must be odd, and 1 or more; .*7"):
            ELA(kernel)
    with pytest.raises(FieldError, match=r"groups = 0: must be 1 or more; .*16"):
        ELA(groups=0)
    with pytest.raises(FieldError, match=r"together = 0: must be 1 or more; .*1"):
        ELA(together=0)
    layer = Layer(0, 3, 3, 4, 4, 12)
    with pytest.raises(FieldError, match=r"groups = 16: must divide the 12 channels of the model; .*4"):
        ELA().parameters(layer)
    with pytest.raises(FieldError, match=r"together = 8: must divide the 12 channels of the model; .*4"):
        ELA(groups=3, together=8).parameters(layer)
    call, x = image_call(ELA(3, 2), (2, 3), 1, 0, E)
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        ELA(3, 2).gate(x, replace(call, mask=Mask((Causal(),))))
