"""AddIt: a picture's queries over the scene's keys and its own, by loops, in a model that is written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit
from heedful.authoring import Fitted
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.method import Stack
from heedful.methods.intervene.diffusion.add_it import AddIt, balance
from tests.test_engine import run

from .painter import HEADS, WIDTH, Both, Cross, inputs

SIZE = WIDTH // HEADS


def _heads(x: Tensor) -> list[Tensor]:
    return list(x.split(SIZE, -1))


def _looked(layer: Cross, x: Tensor, scene: Tensor, scale: float) -> tuple[Tensor, float]:
    """One picture's `[n e]` attention to a scene `[m e]` and itself; and the share of its weight the scene got."""
    out, shares = [], []
    for head in range(HEADS):
        q, k, v = (_heads(part(x))[head] for part in (layer.q, layer.k, layer.v))
        there_k, there_v = (_heads(part(scene))[head] for part in (layer.k, layer.v))
        rows = []
        for i in range(len(x)):
            terms = [float(q[i] @ key) / math.sqrt(SIZE) for key in there_k]
            terms += [float(q[i] @ key) * scale / math.sqrt(SIZE) for key in k]
            powers = [math.exp(term) for term in terms]
            mixed = sum(p * value for p, value in zip(powers, [*there_v, *v], strict=True)) / sum(powers)
            rows.append(mixed)
            shares.append(sum(powers[: len(there_k)]) / sum(powers))
        out.append(torch.stack(rows))
    return torch.cat(out, -1), sum(shares) / len(shares)


def _by_hand(
    model: Both, given: dict[str, Tensor], scene: dict[str, Tensor], scale: float, seen: tuple[int, ...] | None = None
) -> tuple[Tensor, list[float]]:
    """What comes out, and the share of its weight that each self-attention gave to the scene."""
    x, there, shares = given["x"], scene["x"], []
    for number, layer in enumerate((model.own, model.words, model.last)):
        if number == 1:
            x, there = x + layer(x, given["context"]), there + layer(there, scene["context"])
            continue
        told = [
            _looked(layer, mine, theirs if seen is None else theirs[list(seen)], scale)
            for mine, theirs in zip(x, there, strict=True)
        ]
        x, there = x + torch.stack([mixed for mixed, _ in told]), there + layer(there, there)
        shares.append(sum(share for _, share in told) / len(told))
    return x, shares


def _fitted(model: Both, scene: dict[str, Tensor], **fields: Any) -> AddIt:
    return fit(AddIt(until=1.0, **fields), model, [scene])


@pytest.mark.parametrize("scale", [1.05, 0.6, 2.0])
def test_the_scene_is_seen_beside_the_picture(scale: float) -> None:
    model, given, scene = Both(), inputs(), inputs(seed=9)
    method = _fitted(model, scene, scale=scale)
    assert set(method.source or ()) == {"key.0.0", "value.0.0", "key.2.0", "value.2.0"}
    want, _ = _by_hand(model, given, scene, scale)
    with attach(model, method, inputs=given) as run:
        assert close(run(**given).float(), want.float())


def test_one_scene_serves_a_batch() -> None:
    model, given, scene = Both(), inputs(), {name: x[:1] for name, x in inputs(seed=9).items()}
    want, _ = _by_hand(model, given, {name: x.expand(2, -1, -1) for name, x in scene.items()}, 1.05)
    with attach(model, _fitted(model, scene), inputs=given) as run:
        assert close(run(**given).float(), want.float())


def test_some_of_the_scene_s_tokens_alone() -> None:
    model, given, scene = Both(), inputs(), inputs(seed=9)
    method, (want, _) = _fitted(model, scene, role="image"), _by_hand(model, given, scene, 1.05, (2, 3, 4, 7))
    with attach(model, method, roles={"image": ((2, 5), (7, 8))}, inputs=given) as run:
        assert close(run(**given).float(), want.float())
        run.roles = {"image": ((9, 13),)}
        with pytest.raises(FieldError, match="names tokens that the scene's 12 have not"):
            run(**given)


def test_only_the_first_steps_see_it_and_each_its_own() -> None:
    model, given = Both(), inputs()
    scenes = [inputs(seed=10 + i) for i in range(4)]
    batches = [{**scene, "step": (i, 4)} for i, scene in enumerate(scenes)]
    method = fit(AddIt(until=0.5), model, batches)
    assert {name.split(".")[2] for name in method.source or ()} == {"0", "1"}
    assert "step" in batches[0], "what was given is as it was"
    wanted = [_by_hand(model, given, scene, 1.05)[0] for scene in scenes[:2]] + [model(**given)] * 2
    with attach(model, method, inputs=given) as run:
        for i, want in enumerate(wanted):
            with run.denoising(i, of=4):
                assert close(run(**given).float(), want.float())


def test_a_scale_is_found_that_gives_both_as_much() -> None:
    model, given, scene = Both(), inputs(), inputs(seed=9)
    given["x"] = given["x"][:, :10]
    method, shares = _fitted(model, scene, scale=None), []

    class Told(AddIt):
        paper = AddIt.paper

        def _weights(self, *asked: Any) -> Tensor:
            weights = super()._weights(*asked)
            shares.append(float(weights[..., :12].sum(-1).mean()))
            return weights

    told = Told(**{name: getattr(method, name) for name in ("scale", "until", "role", "source")})
    with attach(model, told, inputs=given) as run:
        found = run(**given)
    assert shares[-1] == pytest.approx(0.5)
    with attach(model, method, inputs=given) as run:
        assert torch.equal(run(**given), found)
    for scale in (1.0, 1.05):
        assert abs(_by_hand(model, given, scene, scale)[1][0] - 0.5) > 1e-3


@pytest.mark.parametrize("turn", [1, -1])
def test_the_range_is_halved_whichever_way_it_goes(turn: int) -> None:
    assert balance(lambda scale: 1 / (1 + (scale / 2.5) ** turn)) == pytest.approx(2.5)
    assert balance(lambda scale: 1 / (1 + (scale / 100) ** turn)) == 10.0
    assert balance(lambda scale: 1 / (1 + (scale / 0.001) ** turn)) == 0.1


def test_what_the_model_hides_stays_hidden() -> None:
    """Keys that nobody may see change nothing, and those of the scene, which stand at no place, are seen by all."""
    bare = Bare(text=torch.arange(19) >= torch.tensor([0, 4])[:, None])
    q, k, v = bare.q, bare.k, bare.v
    scene = {"key.0.0": torch.randn_like(k[:1, :, :3]), "value.0.0": torch.randn_like(v[:1, :, :3])}
    found = run(Stack((AddIt(1.3, 1.0, source=Fitted(scene)),)), bare)
    groups = q.shape[1] // k.shape[1]
    for b, head, i in ((0, 0, 0), (1, 3, 7), (0, 2, 18)):
        g = head // groups
        own = slice(4 * b, i + 1)
        keys = torch.cat([scene["key.0.0"][0, g], 1.3 * k[b, g, own]])
        values = torch.cat([scene["value.0.0"][0, g], v[b, g, own]])
        want = (keys @ q[b, head, i] / q.shape[-1] ** 0.5).softmax(0) @ values
        assert close(found[b, head, i], want)


def test_bad_fields_and_scenes_are_named() -> None:
    model, given, scene = Both(), inputs(), inputs(seed=9)
    for wrong, word in (({"scale": 0.0}, "scale"), ({"scale": float("inf")}, "scale"), ({"until": 1.5}, "until")):
        with pytest.raises(FieldError, match=word):
            AddIt(**wrong)
    with pytest.raises(FieldError, match="must hold each forward of the scene"):
        fit(AddIt(), model, [])
    for batches in ([{**scene, "step": 0}], [{**scene, "step": (0, 4, 1)}], [scene, scene]):
        with pytest.raises(FieldError, match='must hold one forward for each step, told by "step"'):
            fit(AddIt(), model, batches)
    method = _fitted(model, scene)
    lost = replace(method, source=Fitted({n: x for n, x in (method.source or {}).items() if "value.2" not in n}))
    short = replace(method, source=Fitted({n: x[..., :2] for n, x in (method.source or {}).items()}))
    many = replace(method, source=Fitted({n: torch.cat([x, x]) for n, x in (method.source or {}).items()}))
    for odd, word in ((lost, "has nothing for layer 2 and step 0"), (short, "where the picture has"), (many, "4, 2")):
        with pytest.raises(FieldError, match=word), attach(model, odd, inputs=given) as run:
            run(**given)
