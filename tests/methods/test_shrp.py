"""SHRP: routes, the shared net and every step's gradient on a llama written out, the counts, and what is pruned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from heedful import fit, models, operate
from heedful.authoring import Fitted, Layer
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.methods import SHRP
from heedful.methods.compress.prune.shrp import _Experts
from tests.by_hand import Steps, block_inputs, causal_map, heads_of, llama_states

INF = float("inf")


def spoken(given: Tensor, hidden: Tensor, p: list[Tensor], groups: int) -> tuple[Tensor, list[int]]:
    """What heads `[b h n d]` become where each token hears one group, and how many tokens chose each."""
    router, inward, out = p
    heads = given.shape[1]
    counts = [0] * groups
    texts = []
    for b in range(len(given)):
        tokens = []
        for n in range(given.shape[2]):
            scores = torch.exp(torch.stack([router[g] @ hidden[b, n] for g in range(groups)]))
            best = max(range(groups), key=lambda g: scores[g].item())
            counts[best] += 1
            said = []
            for h in range(heads):
                x = given[b, h, n]
                if h // (heads // groups) != best:
                    said.append(torch.zeros_like(x))
                    continue
                inner = inward @ x
                inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
                said.append(scores[best] / scores.sum() * (x + out @ inner))
            tokens.append(torch.stack(said))
        texts.append(torch.stack(tokens, 1))
    return torch.stack(texts), counts


def loss(model: Any, ids: Tensor, params: list[Tensor]) -> tuple[Tensor, list[list[int]]]:
    used: list[list[int]] = []

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        given = heads_of(causal_map(rotate(q), rotate(k)), v)
        found, counts = spoken(given, hidden[i], params[3 * i : 3 * i + 3], k.shape[1])
        used.append(counts)
        return found

    with block_inputs(model) as hidden:
        logits = model.lm_head(llama_states(model, ids, attend))
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), used


@pytest.mark.parametrize("kind", ["llama", "mha"])
def test_every_step_and_the_counts_by_hand(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = models.tiny(kind)
    groups = model.config.num_key_value_heads
    batches = [torch.randint(3, 100, (2, 7)), torch.randint(3, 100, (1, 5))]
    steps = Steps(monkeypatch, "Adam")
    how = SHRP(0.5, units=3, epochs=2, rate=0.2, seed=3)
    found = fit(how, model, [{"input_ids": ids} for ids in batches])
    assert len(steps.grads) == 4
    assert set(steps.rates) == {0.2}
    for ids, before, grads in zip([*batches, *batches], steps.before, steps.grads, strict=True):
        params = [x.clone().requires_grad_() for x in before]
        wanted, _ = loss(model, ids, params)
        for one, other in zip(grads, torch.autograd.grad(wanted, params), strict=True):
            assert close_model(one, other)
    assert all(bool(x.any()) for x in steps.grads[-1])
    assert found.importance is not None
    assert sorted(found.importance) == ["0", "1"]
    assert all(close(x.sum(), torch.tensor(1.0)) and len(x) == groups for x in found.importance.values())
    assert all(p.requires_grad for p in model.parameters())
    assert fit(how, model, [{"input_ids": ids} for ids in batches]) == found


def test_heads_are_counted_once_the_router_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("mha")
    batches = [torch.randint(3, 100, (2, 7)), torch.randint(3, 100, (1, 5))]
    learned: list[Tensor] = []

    class Kept(torch.optim.Adam):
        def __init__(self, params: Any, **how: Any) -> None:
            learned.extend(params)
            super().__init__(learned, **how)

    monkeypatch.setattr(torch.optim, "Adam", Kept)
    found = fit(SHRP(units=3, epochs=4, rate=0.5), model, [{"input_ids": ids} for ids in batches])
    counts = [loss(model, ids, [p.detach() for p in learned])[1] for ids in batches]
    assert found.importance is not None
    for layer in range(2):
        both = torch.tensor([a + b for a, b in zip(counts[0][layer], counts[1][layer], strict=True)]).double()
        assert close(found.importance[str(layer)], both / 19)


def test_padding_is_not_counted() -> None:
    experts = _Experts(3)
    text = torch.arange(19)[None] >= torch.tensor([[0], [4]])
    call = Bare(text=text).call
    call = replace(call, params=experts.parameters(Layer(0, 4, 2, 8, 8, 24)))
    assert float(experts.used(torch.zeros(2, 4, 19, 8), call).value.sum()) == 19 + 15


def test_the_router_begins_as_its_seed_says() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=40)
    found, again = (_Experts(7, 2).parameters(layer) for _ in range(2))
    assert {name: tuple(x.shape) for name, x in found.items()} == {"router": (2, 40), "in": (7, 6), "out": (6, 7)}
    assert not bool(found["out"].any())
    draw = torch.Generator().manual_seed(2 * 1009 + 1)
    assert close(found["router"], (2 * torch.rand(2, 40, generator=draw) - 1) / 40**0.5)
    for other in (_Experts(7, 3).parameters(layer), _Experts(7, 2).parameters(Layer(0, 4, 2, 5, 6, 40))):
        for name in ("router", "in"):
            assert torch.equal(found[name], again[name])
            assert not torch.equal(found[name], other[name])


def test_the_heads_that_are_least_used_go() -> None:
    model = models.tiny("mha")
    used = {"0": torch.tensor([0.4, 0.1, 0.2, 0.3]), "1": torch.tensor([0.0, 0.5, 0.3, 0.2])}
    how = SHRP(0.5, form="zeros", importance=Fitted(used))
    assert set(how.dropped()) == {(1, 0), (0, 1), (0, 2), (1, 3)}
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        assert not close_model(operate(model, how)(**inputs).logits, model(**inputs).logits)


def test_says_what_is_wrong() -> None:
    for wrong in (
        {"epochs": 0}, {"units": 0}, {"rate": 0.0}, {"rate": INF}, {"share": 2.0}, {"form": "odd"},
    ):  # fmt: skip
        with pytest.raises(FieldError, match=rf"SHRP\.{next(iter(wrong))} = "):
            SHRP(**wrong)
    how = SHRP()
    assert (how.share, how.units, how.epochs, how.rate, how.seed) == (0.2, 16, 10, 0.01, 0)
    assert SHRP(units=1, epochs=1).epochs == 1
    with pytest.raises(FieldError, match=r"batches = 0: must be 1 or more"):
        fit(SHRP(), models.tiny("mha"), [])
    call = Bare().call
    with pytest.raises(SiteError, match="SHRP, layer 0: the block is not handed hidden states"):
        _Experts().shares(replace(call, hidden=None))
