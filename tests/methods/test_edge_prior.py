"""EdgePrior against posteriors over edges by Bayes' rule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.methods import EdgePrior
from tests.by_hand import heads_of, llama_states

LAYER = Layer(1, 4, 2, 8, 8, 24)
TEXT = torch.ones(2, 19, dtype=torch.bool)
TEXT[0, :4] = False
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


def posterior(likelihood: dict[int, Tensor], prior: dict[int, Tensor]) -> dict[int, Tensor]:
    joint = {e: likelihood[e] * prior[e] for e in likelihood}
    evidence = sum(joint.values())
    return {e: p / evidence for e, p in joint.items()}


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(("decay", "learned"), [(0.0, 0), (0.3, 0), (0.0, 6), (0.3, 6), (0.1, 50)])
def test_heads_are_what_edges_bring_under_their_posterior(decay: float, learned: int, backend: str) -> None:
    bare = Bare(dtype=torch.float64, text=TEXT)
    draw = torch.Generator().manual_seed(2)
    table = torch.randn(4, learned, generator=draw, dtype=torch.float64) if learned else None
    params = {} if table is None else {"prior": table}
    found, _ = bare.run(EdgePrior(decay, learned), backend, 5 if backend == "tiled" else None, params)
    for b in range(2):
        for h in range(4):
            key, value = bare.k[b, h // 2], bare.v[b, h // 2]
            for i in range(19):
                edges = [j for j in range(i + 1) if TEXT[b, j] and TEXT[b, i]]
                if not edges:
                    continue
                likelihood = {j: torch.exp(bare.q[b, h, i] @ key[j] / math.sqrt(8)) for j in edges}
                prior = {}
                for j in edges:
                    prior[j] = torch.tensor(math.exp(-decay * (i - j)), dtype=torch.float64)
                    if table is not None:
                        prior[j] = prior[j] * table[h, min(i - j, learned - 1)].exp()
                want = sum(p * value[j] for j, p in posterior(likelihood, prior).items())
                assert close(found[b, h, i], want)


def test_the_first_steps_loss_and_gradient() -> None:
    model = models.tiny("llama")
    with attach(model, EdgePrior(0.2, 5)) as run:
        with torch.no_grad():
            for p in run.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        mine = [p.detach().clone().requires_grad_() for p in run.parameters()]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
            q, k = rotate(q), rotate(k)
            scores = q @ k.repeat_interleave(2, 1).mT / q.shape[-1] ** 0.5
            rows = []
            for i in range(12):
                lean = torch.stack([mine[layer][:, min(i - j, 4)] - 0.2 * (i - j) for j in range(i + 1)], -1)
                row = (scores[:, :, i, : i + 1] + lean).softmax(-1)
                rows.append(torch.nn.functional.pad(row, (0, 11 - i)))
            return heads_of(torch.stack(rows, 2), v)

        logits = model.lm_head(llama_states(model, IDS, attend))[:, :-1]
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        found = run(IDS, labels=IDS, use_cache=False).loss
        found.backward()
        assert close_model(found.detach(), want.detach())
        for p, slope in zip(run.parameters(), torch.autograd.grad(want, mine), strict=True):
            assert close_model(p.grad, slope)
            assert bool(slope.any())


def test_distance_is_counted_to_either_side() -> None:
    bare = Bare(dtype=torch.float64, rules=())
    table = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, _ = bare.run(EdgePrior(0.0, 3), "reference", params={"prior": table})
    far = (torch.arange(19)[:, None] - torch.arange(19)).abs().clamp(max=2)
    scores = bare.q @ bare.k.repeat_interleave(2, 1).mT / 8**0.5 + table[:, far]
    assert close(found, heads_of(scores.softmax(-1), bare.v))


def test_beside_a_table_in_half_precision_the_decay_is_not_rounded() -> None:
    bare, table = Bare(text=TEXT), torch.zeros(4, 3)
    found, want = (bare.run(EdgePrior(0.3, 3), "reference", params={"prior": x})[0] for x in (table.bfloat16(), table))
    assert close(found, want)


def test_an_even_prior_changes_no_bit() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    plain = model(IDS).logits
    for method in (EdgePrior.neutral(), EdgePrior(0.0, 0)):
        run = attach(model, method, backend="reference")
        found = run(IDS).logits
        run.close()
        assert torch.equal(found, plain)


def test_the_start() -> None:
    assert EdgePrior(0.5, 0).parameters(LAYER) == {}
    table = EdgePrior(0.5, 7).parameters(LAYER)["prior"]
    assert table.shape == (4, 7)
    assert not bool(table.any())
    assert EdgePrior(0.0, 1).parameters(replace(LAYER, heads=3))["prior"].shape == (3, 1)


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"EdgePrior.decay = inf: must be 0 or more"):
        EdgePrior(float("inf"))
    with pytest.raises(FieldError, match=r"EdgePrior.decay = -0.1: must be 0 or more"):
        EdgePrior(-0.1)
    with pytest.raises(FieldError, match=r"EdgePrior.learned = -1: must be 0 or more"):
        EdgePrior(learned=-1)
