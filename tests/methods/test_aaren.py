"""Aaren against a softmax with one query for all, and against the authors' recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Layer
from heedful.conformance.tolerances import close, close_model
from heedful.methods import Aaren
from tests.by_hand import heads_of, llama_states
from tests.methods.linear import Text, agrees


def _by_hand(text: Text, query: Tensor) -> Tensor:
    """Token by token: the highest score so far, and two sums of what is weighed less it."""
    rows = []
    if not text.causal:
        weights = torch.stack([(query[text.head] * k).sum() for k in text.k]).mul(text.scale).exp()
        return (weights[:, None] * text.v).sum(0).div(weights.sum()).expand(len(text.k), -1)
    top, above, below = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
    for k, v in zip(text.k, text.v, strict=True):
        s = (query[text.head] * k).sum() * text.scale
        new = torch.maximum(top, s)
        above = above * (top - new).exp() + v * (s - new).exp()
        below = below * (top - new).exp() + (s - new).exp()
        top = new
        rows.append(above / below)
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_one_query_for_all_tokens(causal: bool, padded: bool) -> None:
    query = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = {"query": query}
    agrees(Aaren(), lambda text: _by_hand(text, query), causal, padded, params=params, unused=("q",))


def test_the_first_steps_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, Aaren()) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = [p for name, p in run.model.named_parameters() if name.endswith("query")]
        found, mine = [p.grad.clone() for p in learned], [p.detach().clone().requires_grad_() for p in learned]
    assert [tuple(p.shape) for p in mine] == [(4, 8), (4, 8)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        k = rotate(k).repeat_interleave(2, 1)  # type: ignore[operator]
        scores = (mine[layer][None, :, None] * k).sum(-1) / 8**0.5  # [b h k]
        n = k.shape[2]
        table = scores[:, :, None].expand(-1, -1, n, -1).masked_fill(torch.ones(n, n).tril() == 0, -torch.inf)
        return heads_of(table.softmax(-1), v)

    logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for one, other in zip(found, mine, strict=True):
        assert other.grad is not None
        assert bool(one.any())
        assert close(one, other.grad)


def test_a_state_of_fixed_size_is_enough() -> None:
    """Keys and values of earlier calls are not looked at: nothing changes when they are no numbers any more."""
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, Aaren()) as run, torch.no_grad():
        whole, cache, parts = run(input_ids=ids).logits, None, []
        for cut in ids.split((9, 1, 1, 5), 1):
            out = run(input_ids=cut, use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
            for layer in cache.layers:
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)
    assert close_model(torch.cat(parts, 1), whole)


def test_the_start() -> None:
    layer = Layer(0, 64, 2, 64, 64, 32)
    first, other = (Aaren().parameters(Layer(n, 64, 2, 64, 64, 32))["query"] for n in (0, 1))
    assert torch.equal(first, Aaren().parameters(layer)["query"])
    assert not torch.equal(first, other)
    assert 0.95 < float(first.std()) < 1.05
