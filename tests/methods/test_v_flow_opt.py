"""VFlowOpt: the importance in loops, entropies by counting, and a search that leaves the last token as it was."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import heedful
from heedful import models
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.sparse.prefill.v_flow_opt import VFlowOpt, patch_entropy

PATCHES, TOKENS = 16, 22  # the image stands behind the first token of each prompt
ROLES = {"patches": ((1, 17),), "image": ((1, 17),)}


@pytest.fixture(scope="module")
def model() -> Any:
    vision = {"image_size": 16}
    return models.tiny("llava", attn_implementation="eager", vision_config=vision, image_seq_length=PATCHES)


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return models.tiny_inputs(model, length=TOKENS, batch=3)


def important(mean: Tensor, threshold: float, alpha: float, entropy: list[float]) -> list[float]:
    """Of each patch, from what patches give each other `[p p]`."""
    n = len(mean)
    received = [sum(float(mean[i, j]) for i in range(n)) / n for j in range(n)]
    far = [i for i in range(n) if received[i] > threshold * sum(received) / n]
    far = far or [received.index(max(received))]
    total = sum(math.exp(e) for e in entropy)
    return [sum(float(mean[i, j]) for i in far) / len(far) + alpha * math.exp(entropy[j]) / total for j in range(n)]


def bits(pixels: Tensor, size: int) -> list[float]:
    """Of each patch of a picture `[3 n n]`."""
    out = []
    for row in range(0, pixels.shape[1], size):
        for column in range(0, pixels.shape[2], size):
            levels: Counter[int] = Counter()
            for i in range(row, row + size):
                for j in range(column, column + size):
                    grey = sum(float(pixels[c, i, j]) for c in range(3)) / 3
                    levels[round((min(1.0, max(-1.0, grey)) + 1) * 127.5)] += 1
            shares = [count / size**2 for count in levels.values()]
            out.append(-sum(share * math.log2(share) for share in shares))
    return out


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0, 1.3, 9.0])
@pytest.mark.parametrize("alpha", [0.0, 0.6, -1.0])
def test_importance_by_loops(threshold: float, alpha: float) -> None:
    by = torch.Generator().manual_seed(0)
    weights, entropy = torch.rand(2, 7, 7, generator=by), torch.rand(2, 7, generator=by)
    method = VFlowOpt(threshold=threshold, alpha=alpha, entropy=Fitted({"entropy": entropy}))
    want = [important(w, threshold, alpha, e.tolist()) for w, e in zip(weights, entropy, strict=True)]
    assert close(method.importance(weights), torch.tensor(want))
    one = replace(method, entropy=Fitted({"entropy": entropy[:1]}))
    want = [important(w, threshold, alpha, entropy[0].tolist()) for w in weights]
    assert close(one.importance(weights), torch.tensor(want))


def test_entropies_by_counting() -> None:
    pixels = torch.randint(-3, 4, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 2.0
    pixels[0, :, :4, :4] = 0.25
    for size in (2, 4):
        assert close(patch_entropy(pixels, size), torch.tensor([bits(x, size) for x in pixels]))
    assert patch_entropy(pixels, 4)[0, 0] == 0
    assert patch_entropy(pixels, 4).max() > 1


@torch.no_grad()
@pytest.mark.parametrize(("share", "count"), [(0.25, 4), (0.3, 5), (0.01, 1)])
def test_a_language_model_sees_the_most_important(model: Any, inputs: Any, share: float, count: int) -> None:
    method = VFlowOpt(1, share, threshold=0.9, alpha=0.3).of(inputs["pixel_values"], 4)
    with heedful.attach(model, method, roles=ROLES) as run:
        found = run(**inputs).logits[:, -1]
    maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[1]
    inner = model.model
    for row in range(3):
        scores = important(maps[row, :, 1:, 1:].mean(0), 0.9, 0.3, bits(inputs["pixel_values"][row], 4))
        kept = sorted(sorted(range(PATCHES), key=lambda i: -scores[i])[:count])
        pixels, ids = inputs["pixel_values"][row], inputs["input_ids"][row]
        states = inner.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-1]
        embeds = inner.language_model.embed_tokens(ids[None]).clone()
        embeds[:, 1:17] = inner.multi_modal_projector(states[:, 1:])
        places = torch.tensor([0, *(1 + i for i in kept), *range(17, TOKENS)])
        out = inner.language_model(inputs_embeds=embeds[:, places], position_ids=places[None])
        assert close_model(found[row], model.lm_head(out.last_hidden_state[0, -1]))


@torch.no_grad()
def test_a_fit_keeps_what_changes_the_last_token_least(model: Any, inputs: Any) -> None:
    batches = [{**inputs, "roles": ROLES}, {**inputs, "pixel_values": inputs["pixel_values"].flip(-1), "roles": ROLES}]
    method = VFlowOpt(1, 0.25, tries=5, seed=3)
    found = heedful.fit(method, model, batches)
    drawn = torch.rand(4, 2, generator=torch.Generator().manual_seed(3))
    settings = [(1.0, 0.0), *((3 * float(t), 2 * float(a) - 1) for t, a in drawn)]
    last: list[Tensor] = []
    hook = model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, out: last.append((out[0] if isinstance(out, tuple) else out)[:, -1])
    )
    alike = []
    for threshold, alpha in settings:
        total = 0.0
        for batch in batches:
            given = {name: x for name, x in batch.items() if name != "roles"}
            model(**given)
            some = VFlowOpt(1, 0.25, threshold=threshold, alpha=alpha).of(given["pixel_values"], 4)
            with heedful.attach(model, some, roles=ROLES) as run:
                run(**given)
            total += float(cosine_similarity(last[-2], last[-1]).mean())
        alike.append(total)
    hook.remove()
    assert len({round(x, 4) for x in alike}) > 1
    best = settings[alike.index(max(alike))]
    assert (found.threshold, found.alpha) == pytest.approx(best, rel=1e-4)
    assert replace(found, threshold=1.0, alpha=0.0) == method


def test_defaults() -> None:
    it = VFlowOpt()
    assert (it.layer, it.share, it.threshold, it.alpha, it.tries, it.seed) == (22, 0.25, 1.0, 0.0, 24, 0)


def test_what_is_wrong_is_said(model: Any, inputs: Any) -> None:
    for settings, match in (
        ({"threshold": -0.1}, "threshold"), ({"threshold": math.inf}, "threshold"), ({"alpha": math.inf}, "alpha"),
        ({"tries": 0}, "tries"), ({"share": 0.0}, "share"),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=match):
            VFlowOpt(**settings)
    weights = torch.rand(2, 7, 7)
    for entropy in (None, Fitted({"entropy": torch.rand(2, 6)}), Fitted({"entropy": torch.rand(3, 7)})):
        with pytest.raises(FieldError, match="of the pictures that are asked about"):
            VFlowOpt(alpha=1.0, entropy=entropy).importance(weights)
    for batches in ([], [inputs]):
        with pytest.raises(FieldError, match="with pixels and roles"):
            heedful.fit(VFlowOpt(layer=1), model, batches)
    assert VFlowOpt(tries=1).tries == 1
