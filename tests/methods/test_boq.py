"""BoQ against the authors' blocks, vector by vector."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Causal, Layer, Mask
from heedful.core.errors import FieldError
from heedful.core.regions import Region
from heedful.methods import BoQ
from tests.images_by_hand import agree, attended_by_hand, image_call, image_of, normed_by_hand

E, HEADS = 8, 4


@pytest.mark.parametrize(("grid", "after", "method"), [((2, 3), 0, BoQ(3, 2)), ((2, 2), 2, BoQ(1, 1))])
def test_bags_of_queries_read_the_patches(grid: tuple[int, int], after: int, method: BoQ) -> None:
    call, x = image_call(method, grid, 1, after, E)

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        seen = [normed_by_hand(y, p, "norm") for y in image_of(tokens, grid, 1).values()]
        found: list[Tensor] = []
        for i in range(method.blocks):
            added = attended_by_hand(p, f"patches_{i}", seen, seen, HEADS)
            seen = [normed_by_hand(y + z, p, f"seen_{i}") for y, z in zip(seen, added, strict=True)]
            fed = [torch.relu(p[f"up_{i}"] @ y + p[f"up_{i}_bias"]) for y in seen]
            fed = [p[f"down_{i}"] @ y + p[f"down_{i}_bias"] for y in fed]
            seen = [normed_by_hand(y + z, p, f"fed_{i}") for y, z in zip(seen, fed, strict=True)]
            bag = list(p[f"queries_{i}"])
            among = attended_by_hand(p, f"among_{i}", bag, bag, HEADS)
            bag = [normed_by_hand(y + z, p, f"asked_{i}") for y, z in zip(bag, among, strict=True)]
            found += [normed_by_hand(y, p, f"found_{i}") for y in attended_by_hand(p, f"across_{i}", bag, seen, HEADS)]
        pooled = sum(w * y for w, y in zip(p["rows"][0], found, strict=True)) + p["rows_bias"]
        return torch.stack([pooled, *tokens[1:]])

    agree(method.pool, by_hand, call, x)


def test_a_model_is_read_at_its_last_layer() -> None:
    model = models.tiny("vit", image_size=16)
    with attach(model, BoQ.example().on(layers=1)) as run:
        run(**models.tiny_inputs(model)).logits.square().sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "heedful" in name]
        assert len(grads) == 29
        assert all(g is not None and bool(g.any()) for g in grads)


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=20)
    before = torch.get_rng_state()
    found, again = (BoQ(60).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    other = BoQ(60).parameters(replace(layer, number=0))
    shapes = {"norm": (20,), "rows": (1, 120)}
    for i in range(2):
        shapes |= {f"queries_{i}": (60, 20), f"up_{i}": (80, 20), f"down_{i}": (20, 80)}
        shapes |= {f"{name}_{i}": (60, 20) for name in ("patches", "among", "across")}
        shapes |= {f"{name}_{i}_out": (20, 20) for name in ("patches", "among", "across")}
        shapes |= {f"{name}_{i}": (20,) for name in ("seen", "fed", "asked", "found")}
        assert 0.95 < float(found[f"queries_{i}"].std()) < 1.05
    assert set(found) == set(shapes) | {f"{name}_bias" for name in shapes if not name.startswith("queries")}
    for name, shape in shapes.items():
        assert found[name].shape == shape
        if shape == (20,):
            assert found[name].tolist() == [1.0] * 20
            assert found[f"{name}_bias"].tolist() == [0.0] * 20
        else:
            assert torch.equal(found[name], again[name])
            assert not torch.equal(found[name], other[name])
    assert not torch.equal(found["queries_0"], found["queries_1"])


def test_where_it_rests_and_what_cannot_be() -> None:
    method = BoQ()
    call, _ = image_call(method, (2, 3), 1, 0, E)
    assert not method.idle(call)
    assert method.idle(replace(call, mask=Mask((Causal(),))))
    assert method.idle(replace(call, roles={"patches": call.roles["patches"]}))
    assert method.idle(replace(call, roles={"cls": Region(((0, 1),))}))
    assert method == BoQ(64, 2)
    assert BoQ.example() == BoQ(3, 1)
    for name, good in (("queries", 64), ("blocks", 2)):
        with pytest.raises(FieldError, match=rf"{name} = 0: must be 1 or more; .*{good}"):
            BoQ(**{name: 0})
