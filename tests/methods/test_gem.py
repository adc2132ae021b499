"""GEM against the authors' steps in loops, on tensors that plain hooks caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import heedful
from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Phase
from heedful.core.errors import FieldError, SiteError
from heedful.kit.written import map_of
from heedful.methods import GEM

HEADS = 4


def alike(x: Tensor, heat: float, iterations: int) -> Tensor:
    """One head's tokens `[n d]` drawn together, and how much each then sees of each."""

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def seen(x: Tensor) -> Tensor:
        rows = [torch.stack([heat * (a @ b) for b in x]).exp() for a in x]
        return torch.stack([row / row.sum() for row in rows])

    for _ in range(iterations):
        x = seen(unit(x)) @ unit(x)
    return seen(unit(x))


def by_hand(model: Any, pixels: Tensor, method: GEM, scales: list[Tensor]) -> Tensor:
    """The authors' second path, beside the model's own."""
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    inputs: dict[int, Tensor] = {}
    streams: dict[int, Tensor] = {}
    handles = []
    for i, layer in enumerate(layers):
        handles.append(
            layer.attention.register_forward_pre_hook(
                lambda _, args, kw, i=i: inputs.update({i: (*args, *kw.values())[0]}), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_pre_hook(lambda _, args, i=i: streams.update({i: args[0]})))
    with torch.no_grad():
        model(pixel_values=pixels)
    for handle in handles:
        handle.remove()
    first = max(0, len(layers) - method.last)
    out = []
    for b in range(len(pixels)):
        path = streams[first][b]
        for i in range(first, len(layers)):
            x, attention = inputs[i][b], layers[i].attention
            named = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
            split = {name: m(x).unflatten(-1, (HEADS, -1)).transpose(0, 1) for name, m in named.items()}
            d = split["query"].shape[-1]
            heat = method.temperature or float(sum(row.norm() for row in x) / len(x)) * d**-0.5
            mixed = []
            for h in range(HEADS):
                maps = [alike(split[name][h], heat, method.rounds) for name in method.of]
                mixed.append(sum(m @ split["value"][h] for m in maps) / len(maps))
            path = path + scales[i] * attention.o_proj(torch.cat(mixed, -1))
        out.append(path)
    return torch.stack(out)


def dino(**sizes: Any) -> Any:
    config = dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        patch_size=4,
        image_size=12,
        use_mask_token=False,
    )
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    model = Dinov2Model(Dinov2Config(**{**config, **sizes})).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "lambda" in name or "norm" in name else 0.0, 0.3)
    return model


@pytest.mark.parametrize(
    "method",
    [
        GEM(last=1),
        GEM(last=2, rounds=0),
        GEM(last=3, rounds=2),
        GEM(last=9, temperature=3.0),
        GEM(last=2, of=("value",), rounds=3),
        GEM(last=1, of=("key", "query")),
    ],
)
def test_the_path_is_the_authors(method: GEM) -> None:
    model = dino()
    pixels = torch.randn(2, 3, 12, 8)
    scales = [layer.layer_scale1.lambda1 for layer in model.encoder.layer]
    with torch.no_grad():
        want = by_hand(model, pixels, method, scales)
        fitted = fit(method, model, ())
        own = model(pixels).last_hidden_state
        with attach(model, fitted) as run:
            assert torch.equal(run(pixel_values=pixels).last_hidden_state, own)
            run(pixel_values=pixels[:1])
            both, one = run[fitted]
    assert close_model(both, want)
    assert close_model(one, want[:1])
    assert not close_model(both, own)


def test_projections_are_copied_with_the_blocks_scale() -> None:
    model = dino()
    maps = fit(GEM(last=2), model, ()).maps
    assert maps is not None
    assert sorted(maps) == ["b.1", "b.2", "o.1", "o.2"]
    x = torch.randn(5, HEADS, 8)
    for i in (1, 2):
        layer = model.encoder.layer[i]
        want = layer.layer_scale1(layer.attention.o_proj(x.flatten(1)))
        assert close(torch.einsum("nhd,ehd->ne", x, maps[f"o.{i}"]) + maps[f"b.{i}"], want)
    vit = models.tiny("vit")
    plain = fit(GEM(), vit, ()).maps
    assert plain is not None
    assert sorted(plain) == ["b.0", "b.1", "o.0", "o.1"]
    out = next(
        m for name, m in vit.named_modules() if name.endswith(("0.attention.output.dense", "0.attention.o_proj"))
    )
    assert close(torch.einsum("nhd,ehd->ne", x, plain["o.0"]) + plain["b.0"], out(x.flatten(1)))


def test_a_projection_without_a_bias_adds_none() -> None:
    model = models.tiny("llama")
    maps = fit(GEM(last=1), model, ()).maps
    assert maps is not None
    assert torch.equal(maps["b.1"], torch.zeros(32))
    assert close(maps["o.1"].flatten(1), model.model.layers[1].self_attn.o_proj.weight)


def test_random_projections_are_the_seeds_own() -> None:
    for seed, layer in ((3, 2), (0, 1)):
        wanted = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(4099 * seed + layer))
        maps, bias = map_of(GEM(seed=seed), replace(Bare().call, layer=layer, hidden=None), 3, 4)
        assert torch.equal(maps, wanted)
        assert bias.tolist() == [0.0] * 12
    wide = replace(Bare().call, hidden=torch.zeros(1, 2, 10))  # a stream that is not as wide as the heads together
    assert [x.shape[0] for x in map_of(GEM(seed=0), wide, 3, 4)] == [10, 10]
    assert GEM.example() == GEM(last=1, seed=0)
    assert (GEM().last, GEM().rounds, GEM().temperature, GEM().of) == (6, 1, None, ("query", "key", "value"))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"last": 0}, r"last = 0: must be 1 or more"),
        ({"rounds": -1}, r"rounds = -1: must be 0 or more"),
        ({"temperature": 0.0}, r"temperature = 0\.0: must be above 0, or None"),
        ({"temperature": float("inf")}, r"temperature"),
        ({"of": ()}, r"of = \(\): must be one or more of query, key, value, each once"),
        ({"of": ("key", "key")}, r"each once"),
        ({"of": ("key", "mind")}, r"must be one or more of"),
    ],
)
def test_fields(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        GEM(**fields)


def test_what_was_not_fitted_is_refused() -> None:
    vit = models.tiny("vit")
    inputs = models.tiny_inputs(vit)
    for method, match in (
        (GEM(last=1), r"maps = None: must be fitted with heedful.fit"),
        (fit(GEM(last=1), dino(hidden_size=64), ()), r"were fitted to another model, or fewer layers: \[e, 4, 8\]"),
    ):
        with pytest.raises(FieldError, match=match), heedful.attach(vit, method) as run:
            run(**inputs)


@torch.no_grad()
def test_a_cache_is_refused() -> None:
    model, cache = models.tiny("llama"), DynamicCache()
    ids = torch.arange(3, 11)[None]
    with attach(model, GEM(last=1, seed=0)) as run:
        run(input_ids=ids, **{CACHE: cache})
        with pytest.raises(SiteError, match="read at once; hand it no cache"):
            run(input_ids=ids[:, :2], **{CACHE: cache})


def test_layers_before_the_path_are_left_alone() -> None:
    call = replace(Bare().call, depth=9)
    assert [GEM(last=2).idle(replace(call, layer=layer)) for layer in (4, 5, 6, 7, 8)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert GEM(last=2).idle(replace(call, layer=8, phase=Phase.DECODE))
    assert GEM(last=2).idle(replace(call, layer=8, cross=True))


@torch.no_grad()
def test_before_a_language_model_it_acts_in_the_encoder() -> None:
    model = models.tiny("llava")
    tower, inputs = model.model.vision_tower, models.tiny_inputs(model)
    for last in (1, 9):
        alone = fit(GEM(last), tower, ())
        with attach(tower, alone) as run:
            run(pixel_values=inputs["pixel_values"])
            (want,) = run[alone]
        within = fit(GEM(last), model, ())
        with attach(model, within, only="model.vision_tower") as run:
            run(**inputs)
            (found,) = run[within]
        assert close_model(found, want)
