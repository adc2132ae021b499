"""VTrans: the first step on a llama written out, and what becomes of the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from heedful import fit, fold, models, operate
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import HeadWeights
from heedful.methods import VTrans
from tests.by_hand import Steps, causal_map, heads_of, llama_states

BETA = 0.3
INF = float("inf")


class Draws:
    """Every normal draw, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Tensor] = []
        own = torch.randn

        def drawn(*shape: int, **how: Any) -> Tensor:
            self.made.append(own(*shape, **how))
            return self.made[-1]

        monkeypatch.setattr(torch, "randn", drawn)


def test_the_first_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (2, 7))
    steps, draws = Steps(monkeypatch, "Adam"), Draws(monkeypatch)
    fit(VTrans(epochs=1, rate=0.02, beta=BETA), model, [{"input_ids": ids}])
    near, noise = draws.made[:2], draws.made[2:]
    assert [x.shape for x in near] == [(2, 2)] * 2
    assert [x.shape for x in noise] == [(2, 2)] * 2
    assert not torch.equal(near[0], near[1])
    assert not torch.equal(noise[0], noise[1])
    params = []
    for x in near:
        params.append((1 + 0.01 * x[0]).requires_grad_())
        params.append((0.01 * x[1] - 9).requires_grad_())
    for found, wanted in zip(steps.before[0], params, strict=True):
        assert close(found, wanted)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        heads = heads_of(causal_map(rotate(q), rotate(k)), v)
        mean, log_variance = params[2 * i : 2 * i + 2]
        rows = []
        for b in range(2):
            z = [mean[h // 2] + (log_variance[h // 2] / 2).exp() * noise[i][b, h // 2] for h in range(4)]
            rows.append(torch.stack([heads[b, h] * z[h] for h in range(4)]))
        return torch.stack(rows)

    logits = model.lm_head(llama_states(model, ids, attend))
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for mean, log_variance in ((params[0], params[1]), (params[2], params[3])):
        for g in range(2):
            loss = loss + BETA * 0.5 * (1 + mean[g] ** 2 / (log_variance[g].exp() + 1e-8)).log()
    grads = torch.autograd.grad(loss, params)
    assert len(steps.grads) == 1
    for found, wanted in zip(steps.grads[0], grads, strict=True):
        assert wanted.abs().max() > 1e-3
        assert close_model(found, wanted)
    assert steps.rates == [0.02]


def test_what_is_kept_of_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("mha")
    batches = [{"input_ids": torch.randint(3, 100, (2, 7))}, {"input_ids": torch.randint(3, 100, (1, 5))}]
    steps, draws = Steps(monkeypatch, "Adam"), Draws(monkeypatch)
    found = fit(VTrans(epochs=3, seed=2), model, batches)
    assert len(steps.grads) == 6
    assert len({tuple(x.flatten().tolist()) for x in draws.made}) == 2 + 12  # nothing is drawn twice
    other = fit(VTrans(epochs=3, seed=2), model, batches)
    assert other == found
    assert fit(VTrans(epochs=3, seed=3), model, batches) != found
    assert set(found.importance) == set(found.means) == {"0", "1"}
    # Adam's first steps move each number by about the rate, and noise is worth less than what it hides
    for i in range(2):
        assert (found.means[str(i)] - 1).abs().max() < 6 * 0.05 * 1.5
        noise = 2 * found.means[str(i)].abs().log() - found.importance[str(i)]
        assert ((noise + 9).abs() < 6 * 0.05 * 1.5).all()
        assert (noise + 9).abs().max() > 0.1


def test_importance_is_squared_mean_over_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("mha")
    draws = Draws(monkeypatch)
    found = fit(VTrans(epochs=1, rate=1e-9), model, [{"input_ids": torch.randint(3, 100, (2, 7))}])
    for i, near in enumerate(draws.made[:2]):
        for g in range(4):
            mean, variance = 1 + 0.01 * near[0, g].double(), (0.01 * near[1, g].double() - 9).exp()
            assert close(found.means[str(i)][g].float(), mean.float())
            assert close(found.importance[str(i)][g].float(), ((mean**2 + 1e-8) / variance).log().float())


def fitted(**more: Any) -> VTrans:
    importance = {"0": torch.tensor([3.0, 1.0]), "1": torch.tensor([2.0, 4.0])}
    means = {"0": torch.tensor([0.5, 2.0]), "1": torch.tensor([3.0, 0.25])}
    return VTrans(importance=Fitted(importance), means=Fitted(means), **more)


def test_noisy_heads_go_and_others_are_scaled() -> None:
    weights = HeadWeights(torch.randn(4, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(5, 4, 3))
    sizes = [Layer(i, 4, 2, 3, 3, 5) for i in range(2)]
    one, two = (fitted(share=0.5).operate(weights, size) for size in sizes)
    assert close(one.o, weights.o[:, :2] * 0.5)
    assert torch.equal(one.k, weights.k[:1])
    assert close(two.o, weights.o[:, 2:] * 0.25)
    assert torch.equal(two.q, weights.q[2:])
    assert fitted(share=0.0).operate(weights, sizes[0]) is weights
    uneven = fitted(share=0.25, form="uneven").operate(weights, sizes[1])
    assert close(uneven.o, torch.cat([weights.o[:, :2] * 3.0, weights.o[:, 2:] * 0.25], 1))
    named = VTrans(groups=((0, 0),)).operate(weights, sizes[0])
    assert torch.equal(named.o, weights.o[:, 2:])


def test_the_smaller_model_loads(tmp_path: Path) -> None:
    model = models.tiny("mha")
    inputs = models.tiny_inputs(model)
    small = fold(model, fit(VTrans(0.5, epochs=1), model, [inputs]))
    assert small.num_parameters() < model.num_parameters()
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)(**inputs).logits
        assert torch.equal(again, small(**inputs).logits)


def test_says_what_is_wrong() -> None:
    for wrong in (
        {"epochs": 0},
        {"rate": 0.0},
        {"beta": 0.0},
        {"rate": INF},
        {"beta": INF},
        {"share": 2.0},
        {"form": "odd"},
    ):
        with pytest.raises(FieldError, match=rf"VTrans\.{next(iter(wrong))} = "):
            VTrans(**wrong)
    how = VTrans()
    assert (how.share, how.epochs, how.rate, how.beta, how.seed) == (0.2, 10, 0.05, 1e-3, 0)
    assert VTrans(epochs=1).epochs == 1
    model = models.tiny("mha")
    with pytest.raises(FieldError, match=r"VTrans\.batches = 0"):
        fit(how, model, [])
    with pytest.raises(FieldError, match=r"VTrans\.importance = None: is not known yet.*VTrans\(\), model, batches"):
        operate(model, how)
