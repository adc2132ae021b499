"""MixtureOfHeads against the authors' rule in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Call, FieldError, Layer, SiteError
from heedful.conformance.tolerances import close
from heedful.core.positions import Positions
from heedful.methods import MixtureOfHeads

B, H, N, D, E = 2, 5, 4, 3, 6
LAYERS = 3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(shared: int) -> dict[str, Tensor]:
    sizes = {"router": H - shared, "kinds": 2, "shared": shared}
    return {name: draw(i, E, n) for i, (name, n) in enumerate(sizes.items()) if n}


def call(params: dict[str, Tensor], is_text: Tensor | None = None) -> Call:
    places = Positions.row(0, N, is_filled=None if is_text is None else is_text[:, None])
    return Call(0, LAYERS, "layer", H, H, places, places, 1.0, hidden=draw(7, B, N, E), params=params)


def softmax(x: list[float]) -> list[float]:
    top = [float(torch.tensor(v, dtype=torch.float64).exp()) for v in x]
    return [t / sum(top) for t in top]


def product(x: Tensor, w: Tensor) -> list[float]:
    return [sum(float(x[i] * w[i, j]) for i in range(len(x))) for j in range(w.shape[1])]


def token_gates(
    x: Tensor, params: dict[str, Tensor], shared: int, routed: int
) -> tuple[list[float], list[float], set[int]]:
    """Gates of all heads, the router's probabilities, and the heads it chose, for one token."""
    chances = softmax(product(x, params["router"]))
    chosen = set(sorted(range(len(chances)), key=lambda i: -chances[i])[:routed])
    total = sum(chances[i] for i in chosen)
    gates = [routed * p / total if i in chosen else 0.0 for i, p in enumerate(chances)]
    if shared:
        first, second = softmax(product(x, params["kinds"]))
        always = [shared * p * 2 * first for p in softmax(product(x, params["shared"]))]
        gates = always + [2 * second * g for g in gates]
    return gates, chances, chosen


@pytest.mark.parametrize(("shared", "routed"), [(0, 2), (1, 2), (2, 1), (2, 3)])
def test_each_token_gates_its_heads(shared: int, routed: int) -> None:
    params, heads = weights(shared), draw(3, B, H, N, D)
    here = call(params)
    found = MixtureOfHeads(shared, routed).gate(heads, here)
    for b in range(B):
        for n in range(N):
            gates, _, _ = token_gates(here.hidden[b, n], params, shared, routed)
            want = torch.stack([heads[b, h, n] * gates[h] for h in range(H)])
            assert close(found[b, :, n], want)
            assert sum(g == 0 for g in gates) == H - shared - routed


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_counts_text_alone(padded: bool) -> None:
    params = weights(1)
    is_text = torch.tensor([[True] * N, [False, False, True, True]]) if padded else None
    here = call(params, is_text)
    found = MixtureOfHeads(1, 2, balance=0.5).unbalance(draw(3, B, H, N, D), here)
    left = H - 1
    mean, share, tokens = [0.0] * left, [0.0] * left, 0
    for b in range(B):
        for n in range(N):
            if is_text is not None and not is_text[b, n]:
                continue
            tokens += 1
            _, chances, chosen = token_gates(here.hidden[b, n], params, 1, 2)
            for i in range(left):
                mean[i] += chances[i]
                share[i] += i in chosen
    of_layer = left * sum(m / tokens * s / tokens for m, s in zip(mean, share, strict=True))
    want = 0.5 * of_layer / LAYERS  # the authors' loss is the mean over layers, weighted
    assert close(found, torch.tensor(want, dtype=torch.float64))


def test_gates_that_know_nothing_are_one() -> None:
    params = {name: torch.zeros_like(x) for name, x in weights(2).items()}
    heads = draw(3, B, H, N, D)
    assert close(MixtureOfHeads(2, 3).gate(heads, call(params)), heads)


def test_the_first_steps_gradient_is_the_rules() -> None:
    """By finite differences of the loss that a trainer would see, gate and balance together."""
    params = {name: x.requires_grad_() for name, x in weights(1).items()}
    heads, method = draw(3, B, H, N, D), MixtureOfHeads(1, 2, balance=0.3)

    def loss() -> Tensor:
        here = call(params)
        return (method.gate(heads, here) ** 2).sum() + method.unbalance(heads, here)

    grads = torch.autograd.grad(loss(), list(params.values()))
    for x, grad in zip(params.values(), grads, strict=True):
        for at in ((0, 0), (E - 1, x.shape[1] - 1)):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    x[at] += step
                    ends.append(float(loss()))
                    x[at] -= step
            assert abs((ends[0] - ends[1]) / 2e-6 - float(grad[at])) < 1e-5 * max(1.0, abs(float(grad[at])))


def test_its_loss_joins_the_models() -> None:
    model = models.tiny("llama").eval()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with attach(model, MixtureOfHeads(1, 2, balance=0.1)) as run, torch.no_grad():
        out = run(input_ids=ids, labels=ids)
        plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert close(out.loss, plain + run.loss())
        assert len(run.parameters()) == 3 * len(run.layer_names)
        for p in run.parameters():  # a router that knows nothing: 2, its number of heads, in every layer and so overall
            p.zero_()
        run(input_ids=ids, labels=ids)
        assert close(run.loss(), torch.tensor(0.1 * 2))


def test_wrong_settings() -> None:
    layer = Layer(0, 4, 4, 8, 8, 32)
    assert {k: tuple(x.shape) for k, x in MixtureOfHeads(1, 2).parameters(layer).items()} == {
        "router": (32, 3), "kinds": (32, 2), "shared": (32, 1)
    }  # fmt: skip
    drawn = MixtureOfHeads(1, 2).parameters(layer)["router"]
    assert drawn.min() < 0 < drawn.max() <= 32**-0.5
    assert drawn.min() >= -(32**-0.5)
    few = MixtureOfHeads(1, 4).parameters(Layer(0, 1, 1, 8, 8, 32))
    assert {k: tuple(x.shape) for k, x in few.items()} == {"kinds": (32, 2), "shared": (32, 1)}
    for wrong in (dict(shared=-1), dict(routed=0), dict(balance=-0.1)):
        with pytest.raises(FieldError):
            MixtureOfHeads(**wrong)
    places = Positions.row(0, N)
    blind = Call(0, 1, "layer", H, H, places, places, 1.0, params=weights(1))
    with pytest.raises(SiteError, match="hidden states to route by"):
        MixtureOfHeads(1, 2).gate(draw(3, B, H, N, D), blind)
