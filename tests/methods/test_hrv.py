"""HRV: which words win a head's eye, what comes of the counts, and what is rescaled by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, fit, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.methods import HRV
from heedful.methods.intervene.diffusion.hrv import _Wins

CROSS = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))
WORDS = {"colour": ((5, 7),), "shape": ((8, 9),), "size": ((7, 8),)}
PLACES = {"colour": (5, 6), "shape": (8,), "size": (7,)}


def _bare(text: Tensor | None = None, words: Any = None, seed: int = 0) -> Bare:
    bare = Bare(Shape(q=6, k=9), seed=seed, dtype=torch.float64, rules=())
    bare.call = replace(bare.call, cross=True, roles=words or WORDS | {"marked": ((1, 3), (4, 5))})
    return bare


def _weights(bare: Bare, b: int, h: int) -> Tensor:
    """One head's scores by hand, `[6 9]`; two heads share the keys of one."""
    return bare.q[b, h] @ bare.k[b, h // 2].T / 8**0.5


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_maps_of_marked_words_are_multiplied_and_nothing_gives_way(backend: str) -> None:
    bare = _bare()
    relevance = {"colour.0": torch.tensor([0.5, 0.0, 2.0, 1.5]), "shape.0": torch.tensor([1.0, 3.0, 0.0, 0.25])}
    fitted = HRV(concept="colour", relevance=Fitted(relevance))
    wanted = {
        HRV(): [-2.0] * 4,
        HRV(factor=0.5): [0.5] * 4,
        fitted: [0.5, 0.0, 2.0, 1.5],
        replace(fitted, against="shape"): [0.0, -3.0, 4.0, 2.75],
    }
    for method, factors in wanted.items():
        found, _ = bare.run(method, backend)
        for b in range(2):
            for h in range(4):
                weights = _weights(bare, b, h).softmax(-1)
                for word in (1, 2, 4):
                    weights[:, word] *= factors[h]
                assert close(found[b, h], weights @ bare.v[b, h // 2])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_wins_go_by_the_mean_over_the_picture_among_the_words_alone(backend: str) -> None:
    method = _Wins(("colour", "shape", "size"))
    seen = set()
    for seed in range(6):
        bare = _bare(seed=seed)
        found, stats = bare.run(method, backend, tile_rows=2)
        counts = torch.zeros(4, 3)
        for b in range(2):
            for h in range(4):
                score = _weights(bare, b, h)
                among = score[:, 5:9].softmax(-1).mean(0)  # over the picture's places
                each = torch.stack([among[:2].mean(), among[3], among[2]])
                counts[h, int(each.argmax())] += 1
                seen.add(int(each.argmax()))
                assert close(found[b, h], score[:, :5].softmax(-1) @ bare.v[b, h // 2, :5]), "and nobody sees the words"
        (won,) = (stat.value for stat in stats.values())
        assert torch.equal(won.float(), counts)
    assert seen == {0, 1, 2}


def test_padded_places_are_not_looked_from() -> None:
    """Queries that are padding have no say: the last two of six places of the second picture."""
    bare = _bare(words={"one": ((0, 1),), "other": ((1, 2),)})
    text = torch.ones(2, 1, 6, dtype=torch.bool)
    text[1, :, 4:] = False
    bare.call = replace(bare.call, queries=replace(bare.call.queries, is_filled=text))
    _, stats = bare.run(_Wins(("one", "other")), "reference")
    (won,) = (stat.value for stat in stats.values())
    for h in range(4):
        ones = sum(
            int(among[:, 0].mean() >= among[:, 1].mean())
            for b, rows in ((0, 6), (1, 4))
            for among in [_weights(bare, b, h)[:rows, :2].softmax(-1)]
        )
        assert won[h].tolist() == [ones, 2 - ones]


def _batches(model: Any, count: int = 5) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(count):
        draw = torch.Generator().manual_seed(i)
        ids, asked = (torch.randint(3, 60, (2, n), generator=draw) for n in (9, 6))
        found.append({"input_ids": ids, "decoder_input_ids": asked, "roles": WORDS})
    return found


def test_a_fit_counts_over_batches_and_shares_wins_among_all_heads() -> None:
    model = models.tiny("bart")
    batches = _batches(model)
    counts = {layer: torch.zeros(4, 3) for layer in range(2)}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer, decoder in enumerate(model.model.decoder.layers):
        attention = decoder.encoder_attn
        for name in ("q_proj", "k_proj"):
            module = getattr(attention, name)
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out, key=(layer, name): seen.__setitem__(key, out)  # type: ignore[misc]
                )
            )
    with attach(model, _Wins(tuple(WORDS)), only=CROSS, roles=WORDS) as run, torch.no_grad():
        for batch in batches:
            run(**{k: v for k, v in batch.items() if k != "roles"})
            for layer in range(2):
                q, k = (seen[layer, name].unflatten(-1, (4, 8)).transpose(1, 2) for name in ("q_proj", "k_proj"))
                scores = q @ k.mT / 8**0.5
                for b in range(2):
                    for h in range(4):
                        among = scores[b, h, :, 5:9].softmax(-1).mean(0)
                        each = torch.stack([among[:2].mean(), among[3], among[2]])
                        counts[layer][h, int(each.argmax())] += 1
    for handle in handles:
        handle.remove()
    total = sum(counts.values()).sum(0)  # type: ignore[union-attr]
    assert (total > 0).all()
    found = fit(HRV(concept="shape"), model, batches, only=CROSS)
    assert set(found.relevance) == {f"{name}.{layer}" for name in WORDS for layer in range(2)}
    for i, name in enumerate(WORDS):
        each = {layer: counts[layer][:, i] / total[i] * 8 for layer in range(2)}
        for layer in range(2):
            assert close(found.relevance[f"{name}.{layer}"], each[layer])
    ranked = sorted(
        ((layer, h) for layer in range(2) for h in range(4)),
        key=lambda head: (-float(counts[head[0]][head[1], 1]), head),
    )
    assert found.order() == tuple(ranked)
    assert "roles" in batches[0], "what was given is as it was"


class _Cross(nn.Module):
    """Attention of two heads to another sequence, as people write it."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q(x), self.k(context), self.v(context)))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross = _Cross()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.cross(x, context=context)


def test_a_denoiser_that_is_not_of_transformers_is_fitted_too() -> None:
    torch.manual_seed(3)
    model, words = _Denoiser(), {"colour": ((3, 4),), "shape": ((4, 5),)}
    batches = [{"x": torch.randn(4, 6, 8), "context": 3 * torch.randn(4, 5, 8), "roles": words} for _ in range(3)]
    won = torch.zeros(2, 2)
    with torch.no_grad():
        for batch in batches:
            q, k = (x.unflatten(-1, (2, 4)) for x in (model.cross.q(batch["x"]), model.cross.k(batch["context"])))
            for b in range(4):
                for h in range(2):
                    among = (q[b, :, h] @ k[b, 3:, h].T / 2).softmax(-1).mean(0)
                    won[h, int(among.argmax())] += 1
    found = fit(HRV(concept="shape"), model, batches)
    for i, name in enumerate(words):
        assert close(found.relevance[f"{name}.0"], won[:, i] / won[:, i].sum() * 2)


def test_a_fitted_one_acts_on_the_marked_words_of_cross_attention_alone() -> None:
    model = models.tiny("bart")
    batch = {k: v for k, v in _batches(model)[0].items() if k != "roles"}
    relevance = {f"colour.{layer}": torch.ones(4) for layer in range(6)}
    with torch.no_grad():
        plain = model(**batch).logits
        with attach(model, HRV(concept="colour", relevance=Fitted(relevance)), roles={"marked": ((0, 3),)}) as run:
            assert close_model(run(**batch).logits, plain)
            run.state.changed.update(run.stack.steps())  # all factors are 1, so nothing changes, as it should
        with attach(model, HRV(), roles={"marked": ((0, 3),)}) as run:
            found = run(**batch).logits
        with attach(model, HRV(), roles={"marked": ((0, 3),)}, only=CROSS) as run:
            assert torch.equal(run(**batch).logits, found), "only cross-attention is touched"
        assert not close_model(found, plain)


def test_errors() -> None:
    relevance = Fitted({"colour.0": torch.ones(4), "shape.0": torch.ones(4)})
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"role": ""}, r"HRV.role = '': must name a role"),
        ({"factor": float("inf")}, r"HRV.factor = inf: must be finite"),
        ({"relevance": relevance}, r"HRV.concept = '': must be one of \['colour', 'shape'\]"),
        ({"relevance": relevance, "concept": "shape", "against": "size"}, r"HRV.against = 'size': must be one of"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            HRV(**settings)
    with pytest.raises(FieldError, match=r"HRV.relevance = None: must be there"):
        HRV(concept="colour").order()
    fitted = HRV(concept="colour", relevance=relevance)
    assert fitted.order() == ((0, 0), (0, 1), (0, 2), (0, 3))
    for layer, heads in ((1, 4), (0, 3)):
        with pytest.raises(FieldError, match=f"in layer {layer} with {heads} heads"):
            fitted.factors(layer, heads)
    model = models.tiny("bart")
    batches = _batches(model)
    for given in ([], [{**batches[0], "roles": {"colour": ((0, 1),)}}], [*batches, {**batches[0], "roles": {}}]):
        with pytest.raises(FieldError, match='must be 1 or more, each with "roles"'):
            fit(HRV(concept="colour"), model, given)
    with pytest.raises(FieldError, match=r"HRV.concept = 'taste': must be one of"):
        fit(HRV(concept="taste"), model, batches)
    one = [{**batches[0], "roles": {"colour": ((5, 7),), "shape": ((8, 9),), "size": ((8, 9),)}}]
    with pytest.raises(FieldError, match=r"words of \['size'\] never won in any head"):
        fit(HRV(concept="colour"), model, one)
