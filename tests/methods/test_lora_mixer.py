"""LoRA-Mixer against a llama whose tokens have merged weights of their own, and its loss against entropies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Layer
from heedful.conformance.tolerances import close_model
from heedful.methods import LoRAMixer
from tests.by_hand import in_pieces, turning

N = 7
IDS = torch.randint(3, 100, (2, N), generator=torch.Generator().manual_seed(1))
MIXER = LoRAMixer(3, 2, 2, scale=1.5, weight=0.7)


def _gates(router: Tensor, token: Tensor, best: int) -> Tensor:
    """Hard gates of one token, with the gradient of its soft ones."""
    shares = torch.softmax(router @ token, 0)
    plain = shares.tolist()
    first = sorted(range(len(plain)), key=lambda e: -plain[e])[:best]
    total = sum(plain[e] for e in first)
    hard = torch.tensor([share / total if e in first else 0.0 for e, share in enumerate(plain)])
    return hard + shares - shares.detach()


def _by_hand(model: Any, ids: Tensor, p: dict[str, Tensor], mixer: LoRAMixer = MIXER) -> tuple[Tensor, Tensor]:
    """Logits, and what experts tell too little of tokens, over layers."""
    base = model.model
    x = base.embed_tokens(ids)
    b, n = ids.shape
    turned, d = turning(model, torch.arange(n)[None]), model.config.head_dim
    untold = torch.zeros(())
    for number, layer in enumerate(base.layers):
        part, y = layer.self_attn, layer.input_layernorm(x)
        router = p[f"0.{number}.router"]

        def merged(name: str, gates: Tensor, number: int = number) -> Tensor:
            up, down = p[f"0.{number}.{name}_up"], p[f"0.{number}.{name}_down"]
            return mixer.scale * sum(g * up[e] @ down[e] for e, g in enumerate(gates))

        made: dict[str, Tensor] = {}
        gates = [[_gates(router, y[t, i], mixer.best) for i in range(n)] for t in range(b)]
        for name, linear in (("query", part.q_proj), ("key", part.k_proj), ("value", part.v_proj)):
            rows = [[(linear.weight + merged(name, gates[t][i])) @ y[t, i] for i in range(n)] for t in range(b)]
            made[name] = torch.stack([torch.stack(r) for r in rows]).unflatten(-1, (-1, d)).transpose(1, 2)
        q, k, v = turned(made["query"]), turned(made["key"]), made["value"]
        k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], 1) for z in (k, v))
        shut = torch.ones(n, n, dtype=torch.bool).triu(1)
        heads = ((q @ k.mT / d**0.5).masked_fill(shut, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        more = [[heads[t, i] + merged("heads", gates[t][i]) @ heads[t, i] for i in range(n)] for t in range(b)]
        x = x + part.o_proj(torch.stack([torch.stack(r) for r in more]))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        shares = torch.softmax(y @ router.T, -1).flatten(0, 1)
        mean = shares.mean(0)
        untold = untold + -(shares * shares.log()).sum() / len(shares) + (mean * mean.log()).sum()
    return model.lm_head(base.norm(x)), untold


def _drawn(run: Any) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in run.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / 3)
    return {name: p.detach().clone().requires_grad_() for name, p in run.state_dict().items()}


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_first_steps_loss_and_gradient(best: int) -> None:
    model, mixer = models.tiny("llama"), LoRAMixer(3, 2, best, scale=1.5, weight=0.7)
    with attach(model, mixer) as run:
        mine = _drawn(run)
        logits, untold = _by_hand(model, IDS, mine, mixer)
        assert close_model(run(IDS).logits, logits)
        want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()) + 0.7 * untold
        found = run(IDS, labels=IDS, use_cache=False).loss
        found.backward()
        assert close_model(found.detach(), want.detach())
        slopes = torch.autograd.grad(want, list(mine.values()))
        for p, slope in zip(run.parameters(), slopes, strict=True):
            assert bool(slope.any())
            assert close_model(p.grad, slope)


def test_the_loss_is_of_tokens_of_text() -> None:
    model = models.tiny("llama")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    other = IDS.clone()
    other[0, :3] = 50
    losses = []
    with attach(model, LoRAMixer(3, 2, 2, weight=1.0, spread=0.1)) as run, torch.no_grad():
        for ids in (IDS, other):
            run(ids, attention_mask=mask, position_ids=place)
            losses.append(run.loss())
        run(other)
        assert close_model(losses[0], losses[1])
        assert not close_model(run.loss(), losses[1])
    with attach(model, LoRAMixer(3, 2, 2, weight=0.0, spread=0.1)) as run, torch.no_grad():
        run(IDS)
        with pytest.raises(FieldError, match="penalises nothing"):
            run.loss()


def test_a_cache_goes_on() -> None:
    model = models.tiny("llama").eval()
    with attach(model, LoRAMixer(3, 2, 2, spread=0.5)) as run, torch.no_grad():
        assert close_model(in_pieces(run, IDS, (4, 1, 2))[0], run(IDS).logits)


def test_the_start() -> None:
    layer = Layer(1, 4, 2, 8, 6, 400)
    found, again = LoRAMixer(5, 3, spread=0.2).parameters(layer), LoRAMixer(5, 3, spread=0.2).parameters(layer)
    sizes = {"query": (400, 32), "key": (400, 16), "value": (400, 12), "heads": (24, 24)}
    shapes = {"router": (5, 400)}
    for part, (takes, gives) in sizes.items():
        shapes |= {f"{part}_down": (5, 3, takes), f"{part}_up": (5, gives, 3)}
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    assert all(torch.equal(x, again[name]) for name, x in found.items())
    assert not torch.equal(found["router"], LoRAMixer(5, 3).parameters(Layer(0, 4, 2, 8, 6, 400))["router"])
    for name in ("router", "query_down"):
        bound = 1 / math.sqrt(400)
        assert 0.98 * bound < float(found[name].max()) <= bound
        assert -bound <= float(found[name].min()) < -0.98 * bound
    assert 0.17 < float(found["query_up"].std()) < 0.23
    assert not bool(LoRAMixer().parameters(layer)["value_up"].any())


def test_errors() -> None:
    for name in ("experts", "rank", "best"):
        with pytest.raises(FieldError, match=rf"LoRAMixer.{name} = 0: must be 1 or more"):
            LoRAMixer(**{name: 0})
    with pytest.raises(FieldError, match=r"LoRAMixer.best = 3: must be no more than 2 experts"):
        LoRAMixer(2, 8, 3)
    assert LoRAMixer(1, 1, 1, 0.0, 0.0).best == 1
    for name in ("scale", "weight", "spread"):
        for bad in (-0.1, float("inf")):
            with pytest.raises(FieldError, match=rf"LoRAMixer.{name} = .*: must be 0 or more"):
                LoRAMixer(**{name: bad})
