"""Likeness of models in loops over neurons, heads and tokens, of what is the same and of what is turned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.explaining import Likeness, likeness
from heedful.explaining.likening import _standard, _together, alike
from tests.readers import ids, padded


def correlation(x: list[float], y: list[float]) -> float:
    """Pearson's; 0 where one of the two does not move."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sx, sy = (math.sqrt(sum((a - m) ** 2 for a in z)) for z, m in ((x, mx), (y, my)))
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / (sx * sy) if sx > 1e-9 and sy > 1e-9 else 0.0


def cka(x: Tensor, y: Tensor) -> float:
    """By its definition: the cosine of two centred Gram matrices of the tokens."""
    centre = torch.eye(len(x)).double() - 1 / len(x)
    grams = [(centre @ z.double() @ z.double().mT @ centre).flatten() for z in (x, y)]
    return float(torch.cosine_similarity(*grams, dim=0))


def test_states_are_likened_neuron_by_neuron_and_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=draw), torch.randn(30, 6, generator=draw)
    y[:, 2] = -2 * x[:, 1] + 5
    x[:, 3] = 7.0
    neurons, layers = alike(x, y)
    each = [[abs(correlation(a, b)) for b in y.mT.tolist()] for a in x.mT.tolist()]
    assert each[1][2] == pytest.approx(1.0)
    assert max(each[3]) == 0.0
    assert neurons == pytest.approx(sum(max(row) for row in each) / 4, rel=1e-5)
    assert layers == pytest.approx(cka(x, y), rel=1e-6)


def test_what_hardly_moves_is_taken_for_still_whatever_the_unit() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=draw).double(), torch.randn(30, 6, generator=draw).double()
    x[:, 3] = 7 + 1e-8 * y[:, 2]
    neurons, _ = alike(x, y)
    assert neurons == pytest.approx(alike(x[:, :3], y)[0] * 3 / 4, rel=1e-6)
    for scale in (1e-5, 1e5):
        assert alike(scale * x, y) == pytest.approx(alike(x, y), rel=1e-6)
    assert alike(torch.full((30, 4), 0.5), y)[0] == 0.0


def test_rows_are_likened_over_what_either_model_lets_them_see() -> None:
    mine = torch.tensor([[[0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.5, 0.0]]])[:, :, None]  # of two heads one row
    theirs = torch.tensor([[[0.1, 0.2, 0.7, 0.0], [0.0, 0.0, 0.1, 0.9]]])[:, :, None]
    for see, row in (([0, 1, 2, 3], theirs), ([0, 2], mine)):
        found, count = _together([mine], [row])
        assert count == 1
        for h in range(2):
            for g in range(2):
                want = correlation(mine[0, h, 0, see].tolist(), row[0, g, 0, see].tolist())
                assert float(found[0][0][h, g]) == pytest.approx(want, abs=1e-6)
    rows = torch.tensor([[[[0.2, 0.3, 0.0], [0.4, 0.4, 0.0]]]])
    seen = torch.tensor([[[True, True, False]] * 2])
    for scale in (1.0, 1e-4):
        half = 0.5**0.5
        assert _standard(scale * rows, seen)[0].tolist() == pytest.approx([-half, half, 0, 0, 0, 0], rel=1e-5)


def test_what_is_turned_has_the_same_subspace_and_other_neurons() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(200, 16, generator=draw)
    turned = x @ torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q
    assert alike(x, x) == pytest.approx((1.0, 1.0))
    assert alike(x, x[:, torch.randperm(16, generator=draw)] + 3) == pytest.approx((1.0, 1.0))
    neurons, layers = alike(x, 2 * turned)
    assert layers == pytest.approx(1.0, rel=1e-5)
    assert neurons < 0.8


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_what_loops_over_states_and_maps_give(kind: str) -> None:
    one = models.tiny(kind, attn_implementation="eager")
    other = models.tiny(kind, seed=3, num_hidden_layers=3, attn_implementation="eager")
    texts = [ids(7, 1, 2), ids(9, 2)]
    found = likeness(one, other, [{"input_ids": text} for text in texts])
    with torch.no_grad():
        outs = [
            [m(input_ids=t, output_attentions=True, output_hidden_states=True) for t in texts] for m in (one, other)
        ]
    for i in range(2):
        for j in range(3):
            x = torch.cat([stream(one, out, i) for out in outs[0]])
            y = torch.cat([stream(other, out, j) for out in outs[1]])
            neurons, layers = alike(x, y)
            assert float(found.neurons[i, j]) == pytest.approx(neurons, rel=1e-4)
            assert float(found.layers[i, j]) == pytest.approx(layers, rel=1e-4)
            heads = torch.zeros(4, 4)
            count = 0
            for mine, theirs in zip(*outs, strict=True):
                a, b = mine.attentions[i].tolist(), theirs.attentions[j].tolist()
                for text in range(len(a)):
                    n = len(a[text][0])
                    for q in range(n):
                        k = q + 1 if kind == "llama" else n
                        if k == 1:
                            continue
                        count += 1
                        for h in range(4):
                            for g in range(4):
                                heads[h, g] += correlation(a[text][h][q][:k], b[text][g][q][:k])
            wanted = (heads / count).amax(1).mean()
            assert float(found.heads[i, j]) == pytest.approx(float(wanted), rel=1e-3)


def stream(model, out, layer: int) -> Tensor:
    """What leaves a layer: the last one's stands before the final norm, which hidden states have behind it."""
    states = out.hidden_states[layer + 1].flatten(0, 1)
    if layer + 1 < model.config.num_hidden_layers or model.config.model_type == "bert":
        return states
    kept: list[Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda _, __, given: kept.append(given if isinstance(given, Tensor) else given[0])
    )
    with torch.no_grad():
        model(inputs_embeds=out.hidden_states[0])
    hook.remove()
    return kept[0].flatten(0, 1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    one, other = models.tiny("llama"), models.tiny("llama", seed=3)
    short, long = ids(11, 1), ids(17, 2)
    apart = likeness(one, other, [{"input_ids": short}, {"input_ids": long}])
    together = likeness(one, other, [padded(short, long, left)])
    for level in ("neurons", "layers", "heads"):
        assert close(getattr(together, level), getattr(apart, level))


def test_a_model_is_like_itself_and_stays_as_it_is() -> None:
    model = models.tiny("llama").train()
    found = likeness(model, model, [{"input_ids": ids(12, 1, 3)}])
    for level in ("neurons", "layers"):
        assert close(getattr(found, level).diagonal(), torch.ones(2))
    assert close(found.heads.diagonal(), torch.ones(2))
    assert bool((found.layers == found.layers.mT).all())
    assert close(found.best("heads"), torch.ones(2))
    assert close(likeness(model, model, [{"input_ids": ids(2)}]).heads.diagonal(), torch.ones(2))  # a single row
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_one_part_of_each_can_be_compared() -> None:
    model = models.tiny("t5")
    inputs = models.tiny_inputs(model, length=8)
    assert likeness(model, model, [inputs], only="encoder").layers.shape == (2, 2)


def test_tells_what_a_reader_wants_to_know() -> None:
    values = torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.5, 0.6]])
    found = Likeness(values, values + 0.1, values + 0.2)
    assert found.best("layers").tolist() == pytest.approx([0.5, 0.7])
    assert [figure.key for figure in found.figures] == ["alike-neurons", "alike-layers", "alike-heads"]
    assert found.figure.values is found.layers
    assert found.figures[2].rows == ["0", "1"]
    assert found.figures[2].columns == ["0", "1", "2"]
    assert repr(found).splitlines()[1:] == [
        "  neurons  0.50 (0.30)",
        "  layers   0.60 (0.40)",
        "  heads    0.70 (0.50)",
    ]
    assert "likeness" in found._repr_html_()


def test_says_what_is_wrong() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match="batches"):
        likeness(model, model, [])
    with pytest.raises(FieldError, match="by name"):
        likeness(model, model, ids(9))  # type: ignore[arg-type]
    vit = models.tiny("vit", image_size=20)
    both = {"input_ids": ids(9), "pixel_values": torch.randn(1, 3, 20, 20)}

    class Takes(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module, name: str) -> None:
            super().__init__()
            self.inner, self.name = inner, name

        def forward(self, **inputs: Tensor):
            return self.inner(**{self.name: inputs[self.name]})

    with pytest.raises(FieldError, match="reads 26 tokens where the model reads 9"):
        likeness(Takes(model, "input_ids"), Takes(vit, "pixel_values"), [both])
