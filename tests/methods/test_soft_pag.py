"""SoftPAG: guidance away from heads that look at themselves, and the search for such heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import Prompt, attach, decode, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.diffusion.soft_pag import SoftPAG, _TowardsSelf


def _weak(model: Any, step: SoftPAG, ids: Tensor, **more: Tensor) -> Tensor:
    _, stack = step.variants(Prompt(tuple(ids[0].tolist())))["weak"]
    with torch.no_grad(), attach(model, stack) as run:
        return run(input_ids=ids, **more).logits


def test_identity_hands_over_a_tokens_own_value() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    seen: dict[str, Tensor] = {}
    attention = model.model.layers[1].self_attn
    handles = [
        attention.v_proj.register_forward_hook(lambda _, args, out: seen.update(v=out)),
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    ]
    for u in (0.0, 0.3, 1.0):
        with torch.no_grad():
            model(**inputs)
            plain = seen["heads"].unflatten(-1, (4, 8)).clone()
            with attach(model, _TowardsSelf(u).on(layers=1, heads=[0, 3])) as run:
                run(**inputs)
                if u == 0:
                    run.state.changed.update(run.stack.steps())  # nothing changes, as it should
        found = seen["heads"].unflatten(-1, (4, 8))
        own = seen["v"].unflatten(-1, (2, 8)).repeat_interleave(2, 2)
        wanted = plain.clone()
        for head in (0, 3):
            wanted[:, :, head] = (1 - u) * plain[:, :, head] + u * own[:, :, head]
        assert close_model(found, wanted)
    for handle in handles:
        handle.remove()


def test_padding_and_steps_change_nothing() -> None:
    model, step = models.tiny("llama"), SoftPAG(u=0.7)
    ids = models.tiny_inputs(model, batch=1)["input_ids"]
    wanted = _weak(model, step, ids)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    assert close_model(_weak(model, step, padded, attention_mask=(padded > 0).long())[:, 4:], wanted)
    _, stack = step.variants(Prompt((3,)))["weak"]
    with torch.no_grad(), attach(model, stack) as run:
        first = run(input_ids=ids[:, :-1], use_cache=True)
        second = run(input_ids=ids[:, -1:], **{CACHE: first[CACHE]})
    assert close_model(torch.cat([first.logits, second.logits], 1), wanted)


def test_logits_go_away_from_the_weak_run() -> None:
    strong, weak = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 3.0, 0.0])
    assert close(SoftPAG(w=2.0).combine({"strong": strong, "weak": weak}), torch.tensor([2.0, 0.0, 0.0]))
    assert close(SoftPAG(w=1.0).combine({"strong": strong, "weak": weak}), torch.tensor([1.5, 1.0, 0.0]))
    assert torch.equal(SoftPAG.neutral().combine({"strong": strong, "weak": weak}), strong)
    model, step = models.tiny("llama"), SoftPAG(heads=((0, 1), (1, 2), (0, 3)), u=0.8, w=3.0)
    ids, out = models.tiny_inputs(model, batch=1)["input_ids"], []
    prompt = Prompt(tuple(ids[0].tolist()))
    for _ in range(4):  # from the whole text each time, without a cache
        with torch.no_grad():
            native = model(input_ids=ids).logits[0, -1]
        out.append(int((4 * native - 3 * _weak(model, step, ids)[0, -1]).argmax()))
        ids = torch.cat([ids, torch.tensor([out[-1:]])], 1)
    assert decode(model, prompt, step, new_tokens=4) == tuple(out)


def _batch(model: Any) -> dict[str, Tensor]:
    ids = models.tiny_inputs(model, batch=3, length=7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "target": torch.tensor([9, 20, 33])}


@pytest.mark.parametrize("u", [0.5, 1.0])
def test_the_hunt_takes_the_best_head_round_by_round(u: float) -> None:
    model = models.tiny("llama")
    batch = _batch(model)
    inputs = {name: x for name, x in batch.items() if name != "target"}
    last = torch.tensor([6, 6, 4])

    def ends(logits: Tensor) -> Tensor:
        return logits[torch.arange(3), last]

    with torch.no_grad():
        strong = ends(model(**inputs).logits)

    def objective(heads: tuple[tuple[int, int], ...]) -> float:
        weak = ends(
            _weak(model, SoftPAG(heads=heads, u=u), inputs["input_ids"], attention_mask=batch["attention_mask"])
        )
        logits = 3 * strong - 2 * weak
        return float(logits.log_softmax(-1)[torch.arange(3), batch["target"]].mean())

    every = [(layer, head) for layer in range(2) for head in range(4)]
    wanted: tuple[tuple[int, int], ...] = ()
    for _ in range(2):
        best = max((pair for pair in every if pair not in wanted), key=lambda pair: objective((*wanted, pair)))
        wanted = (*wanted, best)
    assert fit(SoftPAG(u=u, w=2.0, rounds=2), model, [batch]).heads == wanted
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(3)]
    assert fit(SoftPAG(u=u, w=2.0, rounds=2), model, rows).heads == wanted
    among = ((0, 0), (1, 1), (1, 3))
    found = fit(SoftPAG(u=u, w=2.0, rounds=1, each=2, among=among), model, [batch]).heads
    assert found == tuple(sorted(among, key=lambda pair: -objective((pair,)))[:2])


def test_errors() -> None:
    for settings, match in (
        ({"u": 1.5}, r"SoftPAG.u = 1.5: must lie from 0 to 1"),
        ({"w": float("nan")}, r"SoftPAG.w = nan"),
        ({"rounds": 0}, r"SoftPAG.rounds = 0"),
        ({"each": 0}, r"SoftPAG.each = 0"),
        ({"heads": ((0, -1),)}, r"SoftPAG.heads"),
        ({"among": ((0, 1, 2),)}, r"SoftPAG.among"),
    ):
        with pytest.raises(FieldError, match=match):
            SoftPAG(**settings)  # type: ignore[arg-type]
    model = models.tiny("llama")
    for batches in ([], [models.tiny_inputs(model)]):
        with pytest.raises(FieldError, match='must be 1 or more, each with "target"'):
            fit(SoftPAG(), model, batches)


def test_any_objective_hunts_round_by_round() -> None:
    """A head that is poor alone is taken where it serves beside the one before it."""
    worth = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 2.0, (1, 1): -5.0}
    asked: list[tuple[tuple[int, int], ...]] = []

    def objective(method: SoftPAG) -> float:
        asked.append(method.heads)
        assert method == SoftPAG(method.heads, u=0.7, w=3.0, rounds=2, among=tuple(worth))
        return sum(worth[head] for head in method.heads) + 20 * ({(0, 1), (1, 1)} <= set(method.heads))

    method = SoftPAG(u=0.7, w=3.0, rounds=2, among=tuple(worth))
    assert method.hunt(objective).heads == ((0, 1), (1, 1))
    assert asked == [((0, 0),), ((0, 1),), ((1, 0),), ((1, 1),)] + [((0, 1), x) for x in worth if x != (0, 1)]
    both = SoftPAG(u=0.7, w=3.0, rounds=1, each=2, among=tuple(worth))
    assert both.hunt(lambda m: worth[m.heads[-1]]).heads == ((0, 1), (1, 0))
    assert SoftPAG(rounds=2, among=((1, 0), (0, 1), (0, 0))).hunt(lambda m: 0.0).heads == ((0, 0), (0, 1))
    for among in ((), ((0, 0), (0, 0))):
        with pytest.raises(FieldError, match=r"SoftPAG.among = .*must name 2 heads or more to choose from"):
            SoftPAG(rounds=2, among=among).hunt(objective)


class _Net(torch.nn.Module):
    """One self-attention and one cross-attention, each with its projections named apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.words = (torch.nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        return x + self.words(x, context, context, need_weights=False)[0]


@torch.no_grad()
def test_a_denoisers_prediction_is_guided() -> None:
    net = _Net().eval()
    given = {"x": torch.randn(2, 5, 8), "context": torch.randn(2, 3, 8)}
    step = SoftPAG(u=0.6, w=3.0)
    strong = net(**given)
    with attach(net, step.variants(Prompt((1,)))["weak"][1], inputs=given) as run:
        found = step.combine({"strong": strong, "weak": run(**given)})
    own, x = net.own, given["x"]
    q, k, v = ((x @ w.T + b).unflatten(-1, (2, 4)) for w, b in zip(
        own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3), strict=True
    ))  # fmt: skip
    heads = torch.zeros(2, 5, 2, 4)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                a = torch.softmax(torch.stack([q[b, i, h] @ k[b, j, h] / 2 for j in range(5)]), 0)
                heads[b, i, h] = sum(((1 - 0.6) * a[j] + 0.6 * (i == j)) * v[b, j, h] for j in range(5))
    x = x + own.out_proj(heads.flatten(2))
    weak = x + net.words(x, given["context"], given["context"])[0]  # cross-attention is left alone
    assert close_model(found, strong + 3 * (strong - weak))
    same = SoftPAG(u=0.0, w=3.0)
    assert torch.equal(same.combine({"strong": strong, "weak": found}), strong)
    assert not same.variants(Prompt((1,)))["weak"][1].methods
