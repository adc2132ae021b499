"""GreedyPrune, patch by patch in loops, in a vision model and in a language model that is shown an image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.methods import GreedyPrune
from heedful.methods.sparse.prefill.greedy_prune import greedy

from .test_carve import llava

ROLES = {"patches": ((1, 17),), "image": ((1, 17),)}


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def by_hand(salient: list[float], tokens: list[list[float]], count: int, alike: float) -> list[int]:
    """From the most salient down: what is too like one that was kept is struck out, and fills up at the end."""
    order = sorted(range(len(salient)), key=lambda i: -salient[i])
    kept: list[int] = []
    for i in order:
        if len(kept) < count and all(cosine(tokens[i], tokens[j]) <= alike + 1e-9 for j in kept):
            kept.append(i)
    kept += [i for i in order if i not in kept][: count - len(kept)]
    return sorted(kept)


@pytest.mark.parametrize("alike", [-0.5, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_patch_by_patch(alike: float, count: int) -> None:
    draw = torch.Generator().manual_seed(int(10 * alike) + 7 + count)
    salient, tokens = torch.rand(3, 12, generator=draw), torch.randn(3, 12, 4, generator=draw) + 0.7
    tokens[:, 5] = 2 * tokens[:, 3]
    found = greedy(salient, torch.nn.functional.normalize(tokens, dim=-1), count, alike)
    for row in range(3):
        wanted = by_hand(salient[row].tolist(), tokens[row].tolist(), count, alike)
        assert found[row].nonzero().flatten().tolist() == wanted


def test_a_copy_of_a_salient_patch_is_left_for_others() -> None:
    salient, tokens = torch.tensor([[1.0, 0.9, 0.2]]), torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
    assert greedy(salient, tokens, 2, 0.7).tolist() == [[True, False, True]]
    assert greedy(salient, tokens, 2, 0.9).tolist() == [[True, True, False]]


@pytest.mark.parametrize(("share", "count"), [(0.25, 4), (0.3, 5)])
@torch.no_grad()
def test_an_encoder_chooses_by_its_class_token(share: float, count: int) -> None:
    model: Any = models.tiny("vit", image_size=16, num_hidden_layers=2, attn_implementation="eager")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with heedful.attach(model, GreedyPrune(0, share, 0.1, "patches")) as run:
        found = run(pixel_values=images).logits
    layers, chosen = model.vit.layers, []
    for row in range(2):
        out = model.vit(images[row : row + 1], output_hidden_states=True)
        shown: Tensor = layers[0].layernorm_before(out.hidden_states[0])[0]
        salient = [cosine(patch.tolist(), shown[0].tolist()) for patch in shown[1:]]
        kept = by_hand(salient, shown[1:].tolist(), count, 0.1)
        chosen.append(kept != by_hand(salient, shown[1:].tolist(), count, 0.999))
        x = layers[1](out.hidden_states[1][:, [0, *(1 + i for i in kept)]])
        x = x[0] if isinstance(x, tuple) else x
        assert close_model(found[row], model.classifier(model.vit.layernorm(x)[0, 0]))
    assert any(chosen), "the threshold strikes some out"


@torch.no_grad()
def test_an_encoders_registers_do_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size)).eval()
    images, choose, seen = torch.randn(2, 3, 16, 16), GreedyPrune.choose, []

    def told(self: GreedyPrune, patches: Tensor, asked: Tensor) -> Tensor:
        seen.append((patches, asked))
        return choose(self, patches, asked)

    monkeypatch.setattr(GreedyPrune, "choose", told)
    with heedful.attach(model, GreedyPrune(0, role="patches")) as run:
        run(pixel_values=images)
    shown = model.encoder.layer[0].norm1(model.embeddings(images))
    shown = shown / shown.norm(dim=-1, keepdim=True)
    assert close_model(seen[0][0], shown[:, 5:])  # behind the class token and four registers
    assert close_model(seen[0][1], shown[:, 0])


@torch.no_grad()
def test_each_text_of_a_batch_has_its_own_number_of_patches() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    ids = torch.randint(3, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    roles = [{"image": ((1, 13),)}, {"image": ((1, 4), (6, 9))}, {"image": ((2, 5),)}]
    method = GreedyPrune(0, 0.5, 0.3)
    with heedful.attach(model, method, roles=roles) as run:
        found = run(input_ids=ids).logits
        for row in range(3):
            run.roles = roles[row]
            assert close_model(found[row], run(input_ids=ids[row : row + 1]).logits[0])


@torch.no_grad()
def test_where_nothing_asks_it_says_so() -> None:
    model, ids = models.tiny("llama"), torch.randint(3, 100, (1, 8))
    with (
        pytest.raises(FieldError, match=r"roles = .*image must leave each text a token that asks"),
        heedful.attach(model, GreedyPrune(0), roles={"image": ((0, 8),)}) as run,
    ):
        run(input_ids=ids)


@torch.no_grad()
def answered(model: Any, ids: Tensor, pixels: Tensor, layer: int, count: int, alike: float, asked: int) -> Tensor:
    """The last token's logits of one prompt, whose text ends before `asked`; behind `layer` it has `count` patches."""
    inner, language = model.model, model.model.language_model
    x = language.embed_tokens(ids[None]).clone()
    x[:, 1:17] = inner.multi_modal_projector(inner.vision_tower(pixels[None]).last_hidden_state[:, 1:])
    places = list(range(len(ids)))
    for number, part in enumerate(language.layers):
        n = len(places)
        hidden = torch.full((n, n), -1e9).triu(1)[None, None]
        turns = language.rotary_emb(x, torch.tensor([places]))
        shown = part.input_layernorm(x)[0]
        out = part(x, attention_mask=hidden, position_embeddings=turns)
        x = out[0] if isinstance(out, tuple) else out
        if number == layer:
            salient = [cosine(patch.tolist(), shown[asked - 1].tolist()) for patch in shown[1:17]]
            kept = by_hand(salient, shown[1:17].tolist(), count, alike)
            stays = [place for place in places if not 1 <= place < 17 or place - 1 in kept]
            x, places = x[:, stays], stays
    return model.lm_head(language.norm(x))[0, -1]


@pytest.mark.parametrize(("layer", "share", "count", "alike"), [(0, 0.25, 4, 0.2), (1, 0.1, 2, 0.9)])
@torch.no_grad()
def test_a_language_model_chooses_by_the_last_token_of_its_prompt(
    layer: int, share: float, count: int, alike: float
) -> None:
    model = llava()
    inputs = models.tiny_inputs(model, length=22, batch=3)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with heedful.attach(model, GreedyPrune(layer, share, alike), roles=ROLES) as run:
        found = run(**inputs).logits[:, -1]
        cache = run(input_ids=ids[:, :21], pixel_values=pixels, use_cache=True)
        later = run(input_ids=ids[:, 21:], **{CACHE: cache_of(cache)}).logits[:, -1]
    for row in range(3):
        assert close_model(found[row], answered(model, ids[row], pixels[row], layer, count, alike, 22))
        assert close_model(later[row], answered(model, ids[row], pixels[row], layer, count, alike, 21))


@torch.no_grad()
def test_padding_is_not_the_last_of_the_text() -> None:
    model = llava()
    inputs = models.tiny_inputs(model, length=22, batch=2)
    ids, pixels, seen = inputs["input_ids"], inputs["pixel_values"], torch.ones(2, 25, dtype=torch.long)
    nothing, method = torch.zeros(2, 3, dtype=torch.long), GreedyPrune(0, 0.25, 0.2)
    with heedful.attach(model, method, roles=ROLES) as run:
        seen[:, :3] = 0
        left = run(input_ids=torch.cat([nothing, ids], 1), attention_mask=seen, pixel_values=pixels).logits[:, -1]
        seen = seen.flip(1)
        right = run(input_ids=torch.cat([ids, nothing], 1), attention_mask=seen, pixel_values=pixels).logits[:, 21]
    for row in range(2):
        wanted = answered(model, ids[row], pixels[row], 0, 4, 0.2, 22)
        assert close_model(left[row], wanted)
        assert close_model(right[row], wanted)


@torch.no_grad()
def test_an_image_that_has_not_come_yet_changes_nothing() -> None:
    model = llava()
    ids = models.tiny_inputs(model, length=22)["input_ids"]
    words = {"input_ids": ids.clamp(min=3, max=9)}
    roles = {"patches": ((1, 17),), "image": ((30, 46),)}
    with pytest.warns(InactiveWarning), heedful.attach(model, GreedyPrune(0), roles=roles) as run:
        found = run(**words).logits
    assert close_model(found, model(**words).logits)


@torch.no_grad()
def test_an_image_that_came_in_an_earlier_call_stays_whole() -> None:
    model = llava()
    inputs = models.tiny_inputs(model, length=22)
    first = {"input_ids": inputs["input_ids"][:, :18], "pixel_values": inputs["pixel_values"]}
    cache = cache_of(model(**first, use_cache=True))
    with pytest.warns(InactiveWarning), heedful.attach(model, GreedyPrune(0), roles=ROLES) as run:
        found = run(input_ids=inputs["input_ids"][:, 18:], **{CACHE: cache}).logits[:, -1]
    assert close_model(found, model(**inputs).logits[:, -1])


@torch.no_grad()
def test_an_image_of_which_a_part_is_yet_to_come_stays_whole() -> None:
    model = llava()
    words = {"input_ids": models.tiny_inputs(model, length=22)["input_ids"].clamp(min=3, max=9)}
    idle = pytest.warns(InactiveWarning)
    with idle, heedful.attach(model, GreedyPrune(0), roles={"image": ((6, 26),)}) as run:
        begun = run(input_ids=words["input_ids"][:, :18], use_cache=True)
        found = run(input_ids=words["input_ids"][:, 18:], **{CACHE: cache_of(begun)}).logits[:, -1]
    assert close_model(found, model(**words).logits[:, -1])


def test_defaults_and_wrong_fields() -> None:
    method = GreedyPrune()
    assert (method.layer, method.share, method.alike, method.role) == (2, 0.25, 0.9, "image")
    for settings, match in (
        ({"share": 0.0}, r"GreedyPrune\.share = 0"), ({"share": 1.1}, r"GreedyPrune\.share"),
        ({"alike": -1.1}, r"GreedyPrune\.alike"), ({"alike": 1.1}, r"GreedyPrune\.alike"),
        ({"layer": -1}, r"GreedyPrune\.layer = -1"), ({"role": "text"}, r"GreedyPrune\.role"),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=match):
            GreedyPrune(**settings)
    model: Any = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    idle = pytest.warns(InactiveWarning, match="which was idle")
    with idle, torch.no_grad(), heedful.attach(model, GreedyPrune(0, 1.0, role="patches")) as run:
        found = run(**inputs).logits
    assert torch.equal(found, model(**inputs).logits)
