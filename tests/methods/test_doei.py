"""DOEI against a vision transformer written out, token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Call, Method, Site, reads
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, InactiveWarning, SiteError
from heedful.core.regions import Region
from heedful.core.state import State
from heedful.core.stats import Sum
from heedful.methods import DOEI
from heedful.methods.intervene.vision.doei import GIVEN, TAKEN


def image_model() -> tuple[Any, Tensor]:
    model = models.tiny("vit", image_size=16, attn_implementation="eager")  # a class token and 4 x 4 patches
    return model, models.tiny_inputs(model)["pixel_values"]


def surest(scores: list[float], share: float) -> list[bool]:
    """Which are among the highest, so many that they are the share or just more; the earlier of equals."""
    count = math.ceil(share * len(scores))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


def factors(weights: Tensor, x: Tensor, method: DOEI, first: int) -> list[float]:
    """What each token's part is multiplied with, of the mean head's weights `[n n]` and tokens `[n e]` before it."""
    n, classes = len(x), method.classes
    moves: list[list[float]] = [[] for _ in range(n)]
    for c in range(classes):
        cosines = [max(0.0, float(x[c] @ x[i] / (x[c].norm() * x[i].norm()))) for i in range(n)]
        sure = [float(weights[c, i] + weights[i, c]) + method.alike * cosines[i] / sum(cosines) for i in range(n)]
        for tokens in (list(range(first, n)), list(range(classes))):
            if len(tokens) == 1:
                continue
            for i, high in zip(tokens, surest([sure[i] for i in tokens], method.share), strict=True):
                moves[i].append(method.up if high else -method.down)
    return [1 + (sum(moved) / classes if moved else 0.0) for moved in moves]


@torch.no_grad()
def by_hand(model: Any, pixels: Tensor, method: DOEI, layers: tuple[int, ...], first: int) -> Tensor:
    """Logits of one image under the method in some layers."""
    x = model.vit.embeddings(pixels[None])[0]
    for number, layer in enumerate(model.vit.layers):
        part, seen = layer.attention, layer.layernorm_before(x)
        q, k, v = (m(seen).unflatten(-1, (-1, 8)).transpose(0, 1) for m in (part.q_proj, part.k_proj, part.v_proj))
        weights = (q @ k.mT / 8**0.5).softmax(-1)
        given = part.o_proj((weights @ v).transpose(0, 1).flatten(1))
        if number in layers:
            scale = factors(sum(weights) / len(weights), seen, method, first)
            given = torch.stack([f * row for f, row in zip(scale, given, strict=True)])
        x = x + given
        x = x + layer.mlp(layer.layernorm_after(x))
    return model.classifier(model.vit.layernorm(x)[0])


@pytest.mark.parametrize(
    "method",
    [
        DOEI(),
        DOEI(share=0.3, up=0.2, down=0.9),
        DOEI(share=0.7, up=1.5, down=0.0, alike=0.0),
        DOEI(share=0.25, up=0.0, down=1.0, alike=30.0),
    ],
    ids=repr,
)
def test_likely_patches_count_for_more(method: DOEI) -> None:
    model, pixels = image_model()
    with torch.no_grad(), attach(model, method) as run:
        found = run(pixel_values=pixels).logits
    wanted = torch.stack([by_hand(model, image, method, (0, 1), 1) for image in pixels])
    assert close_model(found, wanted)
    assert not close_model(found, model(pixel_values=pixels).logits)


@pytest.mark.parametrize("alike", [0.0, 2.0])
def test_each_class_token_has_likely_patches_of_its_own(alike: float) -> None:
    """Two class tokens, which are parted from one another too; a third token before the patches is left alone."""
    model, pixels = image_model()
    method = DOEI(share=0.4, up=0.7, down=0.4, alike=alike, classes=2)
    roles = {"patches": Region(((3, 17),), (2, 7))}
    with torch.no_grad(), attach(model, method.on(layers=1), roles=roles) as run:
        found = run(pixel_values=pixels).logits
    wanted = torch.stack([by_hand(model, image, method, (1,), 3) for image in pixels])
    assert close_model(found, wanted)
    other = torch.stack([by_hand(model, image, replace(method, classes=1), (1,), 3) for image in pixels])
    assert not close_model(found, other)


class _Beside(Method):
    """Reads the map too."""

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of(weights.sum())


@pytest.mark.parametrize("what", [DOEI(classes=2), DOEI(classes=2) | _Beside()], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_comes_to_the_same_whoever_computes_the_map(what: Any, backend: str) -> None:
    model, pixels = image_model()
    roles = {"patches": Region(((3, 17),), (2, 7))}
    with torch.no_grad(), attach(model, what, backend=backend, roles=roles) as run:
        found = run(pixel_values=pixels).logits
    assert close_model(found, torch.stack([by_hand(model, image, DOEI(classes=2), (0, 1), 3) for image in pixels]))


def test_tiles_are_put_together() -> None:
    """Three class tokens, whose rows stand in two tiles of two."""
    weights = torch.randn(2, 4, 19, 19, generator=torch.Generator().manual_seed(0)).softmax(-1)
    output, method = torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(1)), DOEI(classes=3)
    bare = Bare(rules=())
    call = replace(bare.call, key=bare.k, state=State())
    for start in range(0, 19, 2):
        rows = slice(start, min(start + 2, 19))
        method.look(weights[:, :, rows], call.tile(rows, slice(0, 19)))
    given, taken = (torch.cat(call.state.forward[name], 1) for name in (GIVEN, TAKEN))
    assert torch.equal(given, weights.mean(1)[:, :3])
    assert torch.equal(taken, weights.mean(1)[:, :, :3])
    scale = [factors(weights[i].mean(0), bare.hidden[i], method, 3) for i in (0, 1)]
    assert close(method.part(output, call), output * torch.tensor(scale)[..., None])
    assert not call.state.forward


def test_it_rests_where_there_is_no_whole_image() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), pytest.warns(InactiveWarning, match="DOEI"), attach(model, DOEI()) as run:
        assert torch.equal(run(**inputs).logits, model(**inputs).logits)


def test_errors() -> None:
    for settings, match in (
        ({"share": 0.0}, r"DOEI.share = 0.0: must lie between 0 and 1"),
        ({"share": 1.0}, r"DOEI.share = 1.0"),
        ({"up": -0.1}, r"DOEI.up = -0.1: must be 0 or more"),
        ({"up": float("inf")}, r"DOEI.up = inf"),
        ({"alike": -1.0}, r"DOEI.alike = -1.0: must be 0 or more"),
        ({"alike": float("inf")}, r"DOEI.alike = inf"),
        ({"down": -0.1}, r"DOEI.down = -0.1: must lie from 0 to 1"),
        ({"down": 1.1}, r"DOEI.down = 1.1"),
        ({"classes": 0}, r"DOEI.classes = 0: must be 1 or more"),
    ):
        with pytest.raises(FieldError, match=match):
            DOEI(**settings)  # type: ignore[arg-type]
    model, pixels = image_model()
    rule = "DOEI.classes = 2: must be at most the 1 tokens before the patches of layer 0; for example classes=1"
    with pytest.raises(FieldError, match=rule), attach(model, DOEI(classes=2)) as run:
        run(pixel_values=pixels)


def test_an_image_whose_block_shows_nothing_is_asked_by_attention_alone() -> None:
    call = replace(Bare().call, hidden=None)
    with pytest.raises(SiteError, match="alike=0 looks at attention alone"):
        DOEI()._likeness(call)


def test_without_strength_nothing_changes() -> None:
    model, pixels = image_model()
    with torch.no_grad(), pytest.warns(InactiveWarning), attach(model, DOEI(up=0.0, down=0.0)) as run:
        assert torch.equal(run(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
