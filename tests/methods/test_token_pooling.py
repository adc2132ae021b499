"""TokenPooling against K-medoids in loops, and a vision transformer that is handed the medoids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning, SiteError
from heedful.methods import TokenPooling
from heedful.methods.sparse.merge.token_pooling import clustered


def image_model() -> tuple[Any, dict[str, Tensor]]:
    model = models.tiny("vit", num_hidden_layers=3, image_size=16, attn_implementation="eager")
    return model, models.tiny_inputs(model, batch=3)


def medoids(x: Tensor, weight: Tensor, count: int, steps: int) -> tuple[list[int], list[int]]:
    """Of points `[p e]`: the medoids, and the medoid of each point."""
    p = len(x)
    apart = [[float((x[i] - x[j]).double().norm()) for j in range(p)] for i in range(p)]
    chosen = sorted(range(p), key=lambda i: -float(weight[i]))[:count]

    def nearest() -> list[int]:
        def of(i: int) -> int:
            return chosen.index(i) if i in chosen else min(range(count), key=lambda c: (apart[i][chosen[c]], c))

        return [of(i) for i in range(p)]

    for _ in range(steps):
        of = nearest()
        for c in range(count):
            members = [i for i in range(p) if of[i] == c]
            chosen[c] = min(members, key=lambda m: (sum(float(weight[i]) * apart[i][m] for i in members), m))
    return chosen, [chosen[c] for c in nearest()]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_medoids(count: int, steps: int) -> None:
    draw = torch.Generator().manual_seed(count)
    x, weight = torch.randn(4, 9, 5, generator=draw), torch.rand(4, 9, generator=draw)
    found, of = clustered(x, weight, count, steps)
    for row in range(4):
        chosen, mine = medoids(x[row], weight[row], count, steps)
        assert found[row].tolist() == chosen
        assert found[row][of[row]].tolist() == mine


def test_points_that_lie_on_one_another() -> None:
    x = torch.tensor([[[0.0], [0.0], [0.0], [5.0]]])
    found, of = clustered(x, torch.tensor([[3.0, 2.0, 1.5, 1.0]]), 3, 3)
    assert found[0].tolist() == [0, 1, 2]  # none of them goes into another
    assert of[0].tolist() == [0, 1, 2, 0]


@torch.no_grad()
def step(model: Any, layer: int, x: Tensor, share: float, steps: int) -> tuple[Tensor, list[int]]:
    """What a layer leaves of tokens `[n e]`, and the number of the token that each goes into."""
    part, y = model.vit.layers[layer], model.vit.layers[layer].layernorm_before(x)
    q, k = (m(y).unflatten(-1, (4, -1)) for m in (part.attention.q_proj, part.attention.k_proj))
    weights = torch.stack([(q[:, h] @ k[:, h].T * q.shape[-1] ** -0.5).softmax(-1) for h in range(4)])
    received = torch.tensor([sum(float(w) for w in weights[..., j].flatten()) for j in range(len(x))])
    out = part(x[None])[0]
    _, of = medoids(out[1:], received[1:], max(1, int(share * (len(x) - 1))), steps)
    into = [0, *(1 + i for i in of)]
    order = list(dict.fromkeys(into))
    return torch.stack([out[i] for i in order]), [order.index(i) for i in into]


@pytest.mark.parametrize(("share", "steps"), [(0.5, 5), (0.9, 1), (0.1, 5)])
@torch.no_grad()
def test_later_layers_have_the_medoids(share: float, steps: int) -> None:
    model, inputs = image_model()
    seen: list[Tensor] = []
    hook = model.vit.layernorm.register_forward_hook(lambda _, args, out: seen.append(out))
    with attach(model, TokenPooling((0, 1), share, steps)) as run:
        logits = run(**inputs).logits
        assert run.active
    hook.remove()
    for row, pixels in enumerate(inputs["pixel_values"]):
        x, first = step(model, 0, model.vit.embeddings(pixels[None])[0], share, steps)
        x, second = step(model, 1, x, share, steps)
        states = model.vit.layernorm(model.vit.layers[2](x[None])[0])
        assert close_model(logits[row], model.classifier(states[0]))
        assert close_model(seen[0][row], torch.stack([states[second[i]] for i in first]))


@torch.no_grad()
def test_at_least_one_patch_is_left_and_all_are_where_all_shall_be() -> None:
    model, inputs = image_model()
    counts: list[int] = []
    hook = model.vit.layers[2].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    for share, left in ((0.01, 2), (0.25, 5), (0.99, 16)):
        with attach(model, TokenPooling((1,), share)) as run:
            run(**inputs)
        assert counts.pop() == left
    with pytest.warns(InactiveWarning), attach(model, TokenPooling((1,), 1.0)) as run:
        assert torch.equal(run(**inputs).logits, model(**inputs).logits)
    hook.remove()


def test_texts_of_unlike_length() -> None:
    model = models.tiny("bert")
    ids = models.tiny_inputs(model, length=6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.no_grad(), attach(model, TokenPooling((0,), 0.5)) as run:
        with pytest.raises(SiteError, match=r"unlike numbers of patches: \[3, 5\]"):
            run(input_ids=ids, attention_mask=mask)
        assert bool(run(input_ids=ids).logits.isfinite().all())


def test_tokens_are_pooled_before_the_fourth_the_seventh_and_the_tenth_layer() -> None:
    """As in the comparison whose settings these are; three steps each."""
    model = models.tiny("vit", num_hidden_layers=12, image_size=16)
    counts: list[int] = []
    hooks = [x.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1])) for x in model.vit.layers]
    with torch.no_grad(), attach(model, TokenPooling()) as run:
        run(**models.tiny_inputs(model))
    for hook in hooks:
        hook.remove()
    left = [1 + 16, 1 + 11, 1 + 7, 1 + 4]  # 70 % each time
    assert counts == [n for n in left for _ in range(3)]
    assert TokenPooling().rounds == 3


@pytest.mark.parametrize(
    ("field", "value"), [("layers", ()), ("layers", (-1, 2)), ("share", 0.0), ("share", 1.1), ("rounds", -1)]
)
def test_bad_fields(field: str, value: Any) -> None:
    with pytest.raises(FieldError, match=field):
        TokenPooling(**{field: value})
