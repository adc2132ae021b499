"""ImageDecomposition: parts that add up to what attention gives, and TextSpan as the authors' code has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from heedful import attach, fit, models
from heedful.authoring import Fitted
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Phase
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.kit.written import map_of
from heedful.methods import ImageDecomposition
from heedful.methods.explain.image_decomposition import Contributions

HEADS, WIDTH = 4, 32


def dino() -> Any:
    torch.manual_seed(2)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, patch_size=4, image_size=12)
    model = Dinov2Model(Dinov2Config(**sizes, use_mask_token=False, attn_implementation="eager")).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "lambda" in name or "norm" in name else 0.0, 0.3)
    return model


def by_hand(model: Any, pixels: Tensor, row: int) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer what each head brings from each token, `[b h n e]`, and what the block adds in all, `[b e]`."""
    values: list[Tensor] = []
    given: list[Tensor] = []
    handles = []
    for layer in model.encoder.layer:
        handles.append(layer.attention.v_proj.register_forward_hook(lambda _, args, out: values.append(out)))
        handles.append(layer.layer_scale1.register_forward_hook(lambda _, args, out: given.append(out[:, row])))
    with torch.no_grad():
        maps = model(pixels, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    parts = []
    for layer, a, v in zip(model.encoder.layer, maps, values, strict=True):
        scale, o = layer.layer_scale1.lambda1, layer.attention.o_proj.weight
        d = WIDTH // HEADS
        each = [
            torch.stack(
                [
                    a[:, h, row, i, None] * (v[:, i, h * d : h * d + d] @ o[:, h * d : h * d + d].T)
                    for i in range(v.shape[1])
                ],
                1,
            )
            for h in range(HEADS)
        ]
        parts.append(scale * torch.stack(each, 1))
    return parts, given


@pytest.mark.parametrize(("last", "tokens"), [(1, 1), (2, 1), (9, 3)])
def test_parts_are_those_of_heads_and_tokens_and_add_up(last: int, tokens: int) -> None:
    model, pixels = dino(), torch.randn(2, 3, 12, 8)
    directions = torch.randn(3, WIDTH)
    method = fit(ImageDecomposition(last, tokens, Fitted({"d": directions})), model, ())
    parts, given = by_hand(model, pixels, tokens - 1)
    with torch.no_grad(), attach(model, method) as run:
        run(pixel_values=pixels)
        run(pixel_values=pixels[:1])
        found = run[method]
    layers = list(range(max(0, 3 - last), 3))
    assert list(found.heads) == list(found.tokens) == layers
    for layer in layers:
        want = torch.cat([parts[layer], parts[layer][:1]])
        assert close_model(found.heads[layer], want.sum(2))
        assert close_model(found.tokens[layer], want @ directions.T)
        block = model.encoder.layer[layer]
        bias = block.layer_scale1.lambda1 * block.attention.o_proj.bias
        assert close_model(found.heads[layer].sum(1) + bias, torch.cat([given[layer], given[layer][:1]]))
    whole = sum(torch.cat([parts[layer], parts[layer][:1]]).sum(1) for layer in layers)
    assert close_model(found.map, whole @ directions.T)
    assert str(found) == f"contributions of 4 heads in each of {len(layers)} layers to the class tokens of 3 images"


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_any_tiling_gives_the_same(backend: str) -> None:
    model, pixels = dino(), torch.randn(2, 3, 12, 8)
    method = fit(ImageDecomposition(tokens=2), model, ())
    parts, _ = by_hand(model, pixels, 1)
    rows = {"tile_rows": 1} if backend == "tiled" else {}
    with torch.no_grad(), attach(model, method, backend=backend, **rows) as run:
        run(pixel_values=pixels)
        found = run[method]
    assert found.tokens == {}
    assert close_model(found.heads[2], parts[2].sum(2))


def test_tokens_that_the_class_token_does_not_see_give_nothing() -> None:
    bare = Bare()  # causal, so that the third token sees three
    method = ImageDecomposition(tokens=3, directions=Fitted({"d": torch.eye(24)[:2]}), seed=0)
    stats = bare.run(method, "reference")[1]
    found = method.answer(Readings({0: next(iter(stats.values()))})).tokens[0]
    assert found.shape == (2, 4, 19, 2)
    assert bool(found[:, :, :3].all())
    assert not bool(found[:, :, 3:].any())


def text_span(data: Tensor, pool: Tensor, count: int, rank: int) -> tuple[list[int], list[float]]:
    """The authors' replace_with_iterative_removal."""
    vh = torch.linalg.svd(data, full_matrices=False).Vh[:rank]
    pool = (vh.T @ torch.linalg.inv(vh @ vh.T) @ vh @ pool.T).T
    mean = data.mean(0, keepdim=True)
    data = data - mean
    rebuilt = mean.repeat(len(data), 1)
    chosen, shares = [], []
    spread = data.var(0, unbiased=False).sum()
    for _ in range(count):
        top = int((data @ pool.T).std(0).argmax())
        text = pool[top].clone()
        size = text @ text
        rebuilt = rebuilt + (data @ text / size)[:, None] * text
        data = data - (data @ text / size)[:, None] * text
        pool = pool - (pool @ text / size)[:, None] * text
        chosen.append(top)
        shares.append(float(rebuilt.var(0, unbiased=False).sum() / spread))
    return chosen, shares


@pytest.mark.parametrize(("count", "rank"), [(1, 80), (4, 80), (3, 4), (2, 6)])
def test_directions_are_found_as_the_authors_find_them(count: int, rank: int) -> None:
    draw = torch.Generator().manual_seed(count)
    heads = torch.randn(12, 3, 20, generator=draw, dtype=torch.float64)
    pool = torch.randn(9, 20, generator=draw, dtype=torch.float64)
    found, shares = Contributions({5: heads}, {}).span(5, 2, pool, count, rank)
    wanted, wanted_shares = text_span(heads[:, 2], pool, count, min(rank, 12))
    assert found == wanted
    assert close(torch.tensor(shares), torch.tensor(wanted_shares))
    assert shares == sorted(shares)


def test_no_more_directions_than_there_are() -> None:
    heads = torch.randn(12, 1, 20, generator=torch.Generator().manual_seed(0))
    assert sorted(Contributions({0: heads}, {}).span(0, 0, torch.eye(20)[:3], 7)[0]) == [0, 1, 2]


def test_layers_before_the_last_are_left_alone() -> None:
    call = replace(Bare().call, depth=9)
    assert [ImageDecomposition(2).idle(replace(call, layer=layer)) for layer in (5, 6, 7, 8)] == [
        True,
        True,
        False,
        False,
    ]
    assert ImageDecomposition(2).idle(replace(call, layer=8, phase=Phase.DECODE))
    assert ImageDecomposition(2).idle(replace(call, layer=8, cross=True))


def test_numbers_and_random_projections() -> None:
    assert (ImageDecomposition().last, ImageDecomposition().tokens) == (4, 1)
    assert ImageDecomposition.example() == ImageDecomposition(seed=0)
    for seed, layer in ((3, 2), (0, 1)):
        wanted = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(4099 * seed + layer))
        assert torch.equal(
            map_of(ImageDecomposition(seed=seed), replace(Bare().call, layer=layer, hidden=None), 3, 4)[0], wanted
        )


def test_errors() -> None:
    for fields, match in (
        ({"last": 0}, r"last = 0: must be 1 or more"),
        ({"tokens": 0}, r"tokens = 0: must be 1 or more"),
        ({"directions": Fitted({"e": torch.ones(1, 2)})}, r'must hold "d" \[m e\]'),
        ({"directions": Fitted({"d": torch.ones(2)})}, r'must hold "d" \[m e\]'),
    ):
        with pytest.raises(FieldError, match=match):
            ImageDecomposition(**fields)  # type: ignore[arg-type]
    vit = models.tiny("vit")
    inputs = models.tiny_inputs(vit)
    other = fit(ImageDecomposition(), models.tiny("vit", num_attention_heads=2), ())
    for method, match in ((ImageDecomposition(), "must be fitted with heedful.fit"), (other, "were fitted to another")):
        with pytest.raises(FieldError, match=match), attach(vit, method) as run:
            run(**inputs)


@torch.no_grad()
def test_before_a_language_model_it_acts_in_the_encoder() -> None:
    model = models.tiny("llava")
    tower, inputs = model.model.vision_tower, models.tiny_inputs(model)
    method = ImageDecomposition(1, directions=Fitted({"d": torch.eye(32)[:2]}))
    with attach(tower, alone := fit(method, tower, ())) as run:
        run(pixel_values=inputs["pixel_values"])
        want = run[alone]
    with attach(model, within := fit(method, model, ()), only="model.vision_tower") as run:
        run(**inputs)
        found = run[within]
    assert list(found.heads) == list(want.heads) == [1]
    assert close_model(found.heads[1], want.heads[1])
    assert close_model(found.map, want.map)
