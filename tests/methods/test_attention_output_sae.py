"""Sparse autoencoders of heads: their first steps by hand, and what they tell of a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import attach, edit, models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.sites import Site
from heedful.methods.explain.attention_output_sae import AttentionOutputSAE
from tests.by_hand import causal_map, heads_of, llama_states

H, D = 4, 8


def llama() -> Any:
    torch.manual_seed(7)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": H, "num_key_value_heads": 2}
    model = models.tiny("llama", **sizes)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(30)  # heads with something to say
    return model


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, layer: int) -> Tensor:
    """Heads of one layer in a row, `[b n h*d]`."""
    kept = {}

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        kept[i] = heads_of(causal_map(rotate(q), rotate(k)), v)
        return kept[i]

    llama_states(model, ids, attend)
    return kept[layer].transpose(1, 2).flatten(2)


def maps(m: int) -> dict[str, Tensor]:
    """Those of an autoencoder that is made up."""
    draw = torch.Generator().manual_seed(2)
    shapes = {"encoder": (H, D, m), "decoder": (m, H, D), "bias": (m,), "center": (H, D)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def fire(x: Tensor, made: dict[str, Tensor]) -> Tensor:
    """Of one token `[h*d]`: each feature in turn, `[m]`."""
    encoder, center = made["encoder"].flatten(0, 1), made["center"].flatten()
    return torch.stack([((x - center) @ encoder[:, i] + made["bias"][i]).clamp(min=0) for i in range(encoder.shape[1])])


def rebuilt(x: Tensor, made: dict[str, Tensor]) -> Tensor:
    a = fire(x, made)
    return sum(a[i] * made["decoder"][i].flatten() for i in range(len(a))) + made["center"].flatten()  # type: ignore


class Steps:
    """What each step of Adam was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: list[list[Tensor]] = []
        self.grads: list[list[Tensor]] = []
        self.settings: list[Any] = []
        kept = self

        class Kept(torch.optim.Adam):
            def step(self, closure: Any = None) -> None:
                (group,) = self.param_groups
                kept.before.append([p.detach().clone() for p in group["params"]])
                kept.grads.append([p.grad.detach().clone() for p in group["params"]])
                kept.settings.append((group["lr"], group["betas"]))
                super().step()

        monkeypatch.setattr(torch.optim, "Adam", Kept)


NAMES = ("encoder", "decoder", "bias", "center")


@pytest.mark.parametrize("layer", [0, 1])
def test_steps_go_down_error_and_penalty_with_rows_of_length_one(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = llama(), Steps(monkeypatch)
    ids = torch.randint(40, (2, 6))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batches = [{"input_ids": ids[:, :4]}, {"input_ids": ids}]
    method = AttentionOutputSAE(layer, widen=2, penalty=0.3, rate=0.05, tokens=16, epochs=2, seed=4)
    found = heedful.fit(method, model, batches)
    assert steps.settings == [(0.05, (0.0, 0.9999))] * 4  # 20 tokens: a step of 16 and one of 4 each time
    tokens = torch.cat([by_hand(model, x["input_ids"], layer).flatten(0, 1) for x in batches])
    draw = torch.Generator().manual_seed(4)
    for step, rows in enumerate(
        [*torch.randperm(20, generator=draw).split(16), *torch.randperm(20, generator=draw).split(16)]
    ):
        start = [x.clone().requires_grad_() for x in steps.before[step]]
        made = dict(zip(NAMES, start, strict=True))
        assert made["encoder"].shape == (H, D, 2 * H * D)
        lengths = made["decoder"].flatten(1).norm(dim=1)
        assert close(lengths, torch.ones(2 * H * D))
        if step:  # the decoder was set to length 1 since its gradient was taken at what the last step left
            continue
        loss = torch.zeros(())
        for x in tokens[rows]:
            loss = loss + ((rebuilt(x, made) - x).square().sum() + 0.3 * fire(x, made).sum()) / len(rows)
        loss.backward()
        row = made["decoder"].detach().flatten(1)
        gradient = made["decoder"].grad.flatten(1)
        along = torch.stack([g - (g @ r) * r for g, r in zip(gradient, row, strict=True)])
        assert close(steps.grads[0][1].flatten(1), along)
        for i in (0, 2, 3):
            assert close(steps.grads[0][i], start[i].grad)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert found.layer == layer
    assert found.sae["decoder"].shape == (2 * H * D, H, D)
    assert not torch.equal(found.sae["encoder"], steps.before[-1][0])


def test_fresh_maps_reach_to_the_bound_and_a_seed_draws_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = llama(), Steps(monkeypatch)
    for seed in (None, 0, 1):
        heedful.fit(AttentionOutputSAE(widen=4, seed=seed), model, [{"input_ids": torch.arange(5)[None]}])
    first, again, other = steps.before
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    bound = (6 / 128) ** 0.5
    assert bound * 0.99 < first[0].max() <= bound
    assert -bound <= first[0].min() < -0.99 * bound
    assert abs(float(first[0].mean())) < 0.02 * bound
    assert abs(float(first[1].mean())) < 0.02 * float(first[1].abs().max())
    assert not first[2].any()
    assert not first[3].any()


def test_padding_is_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = llama(), Steps(monkeypatch)
    ids = torch.randint(1, 40, (1, 5))
    heedful.fit(AttentionOutputSAE(widen=1), model, [{"input_ids": ids}])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 5)], 1).long()
    heedful.fit(AttentionOutputSAE(widen=1), model, [{"input_ids": padded, "attention_mask": mask}])
    for alone, beside in zip(*steps.grads, strict=True):
        assert close(alone, beside)


def test_it_tells_what_features_did_on_a_text() -> None:
    model, made = llama(), maps(12)
    ids = [torch.randint(40, (2, 6)), torch.randint(40, (1, 3))]
    method = AttentionOutputSAE(1, sae=Fitted(made))
    with torch.no_grad(), attach(model, method) as run:
        for each in ids:
            run(input_ids=each)
        assert [layer for _, _, layer in run.state.statistics] == [1]
    told = run[method]
    tokens = torch.cat([by_hand(model, each, 1).flatten(0, 1) for each in ids])
    fired = torch.stack([fire(x, made) for x in tokens])
    parts = torch.zeros(12, H)
    for x, a in zip(tokens, fired, strict=True):
        x = (x - made["center"].flatten()).view(H, D)
        for i in range(12):
            for h in range(H):
                parts[i, h] += float(a[i] > 0) * float(x[h] @ made["encoder"][h, :, i]) / len(tokens)
    error = sum(float((rebuilt(x, made) - x).square().sum()) for x in tokens)
    assert told.layer == 1
    assert close(told.rate, (fired > 0).double().mean(0))
    assert close(told.strength.float(), fired.mean(0))
    assert close(told.by_head.float(), parts)
    assert told.lost == pytest.approx(error / float(tokens.square().sum()), rel=1e-4)
    assert told.at_once == pytest.approx(float((fired > 0).float().sum(1).mean()))
    assert str(told).startswith(f"{told.at_once:.1f} of 12 features at a token")
    described = method.describe(told)
    alive, most = told.rate > 0, parts.argmax(1)
    shares = [float((alive & (most == h)).sum()) / float(alive.sum()) for h in range(H)]
    assert described.figures[0].values.tolist() == [pytest.approx(shares)]
    assert described.figures[0].layers == [1]
    order = [i for i in told.strength.argsort(descending=True).tolist() if alive[i]]
    assert [row[0] for row in described.figures[1].rows] == order
    assert described.figures[1].rows[0][1:] == (
        f"{told.rate[order[0]]:.0%}", f"{told.strength[order[0]]:.3f}", f"1.{most[order[0]]}",
    )  # fmt: skip
    several = sum(int((alive & (most == h)).sum()) > 1 for h in range(H))
    assert f"{int(alive.sum())} of 12 features fire" in described.findings[0].text
    assert f"{several} of 4 heads give most of more than one" in described.findings[0].text


def test_a_model_runs_on_what_features_keep() -> None:
    model, made, ids = llama(), maps(12), torch.randint(40, (1, 6))
    method = AttentionOutputSAE(1, sae=Fitted(made))
    x = by_hand(model, ids, 1)
    heads = x.unflatten(2, (H, D)).transpose(1, 2)
    want = torch.stack([rebuilt(token, made) for token in x[0]])
    assert close(method.through(heads).transpose(1, 2).flatten(2)[0], want)
    assert close(method.features(heads)[0, 3], fire(x[0, 3], made))
    with torch.no_grad(), attach(model, edit(Site.HEAD_OUTPUT, lambda x, call: method.through(x)).on(layers=1)) as run:
        spliced = run(input_ids=ids).logits

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        own = heads_of(causal_map(rotate(q), rotate(k)), v)
        return own if i == 0 else want.unflatten(1, (H, D)).transpose(0, 1)[None]

    assert close(spliced, model.lm_head(llama_states(model, ids, attend)).detach())


def test_silent_features_are_told_of_without_a_fault() -> None:
    model, made = llama(), maps(3)
    made["bias"] -= 1e6
    method = AttentionOutputSAE(sae=Fitted(made))
    with torch.no_grad(), attach(model, method) as run:
        run(input_ids=torch.arange(5)[None])
    told = method.describe(run[method])
    assert told.figures[0].values.tolist() == [[0.0] * H]
    assert told.figures[1].rows == []
    assert "0 of 3 features fire" in told.findings[0].text


def test_says_what_is_wrong() -> None:
    for wrong in ({"layer": -1}, {"widen": 0}, {"tokens": 0}, {"epochs": 0}, {"penalty": -0.1}, {"rate": 0.0}):
        with pytest.raises(FieldError, match=next(iter(wrong))):
            AttentionOutputSAE(**wrong)
    assert AttentionOutputSAE(0, widen=1, penalty=0, tokens=1, epochs=1).penalty == 0
    model, ids = llama(), torch.arange(5)[None]
    with pytest.raises(FieldError, match="batches"):
        heedful.fit(AttentionOutputSAE(), model, [])
    with pytest.raises(FieldError, match="below 2"):
        heedful.fit(AttentionOutputSAE(2), model, [{"input_ids": ids}])
    with pytest.raises(FieldError, match=r"heedful\.fit"), attach(model, AttentionOutputSAE()) as run:
        run(input_ids=ids)
    method = AttentionOutputSAE(sae=Fitted({**maps(3), "encoder": torch.randn(3, D, 3)}))
    with pytest.raises(FieldError, match="4 of width 8 here"), attach(model, method) as run:
        run(input_ids=ids)
