"""S3Attention against projections by hand, an index in loops, BM25 as it is printed, and a fit's first steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import Prompt, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.methods import S3Attention
from heedful.methods.sparse.tokens._spans import bm25, scaled
from heedful.methods.sparse.tokens.s3_attention import _Projections
from tests.by_hand import Steps, causal_map, heads_of, llama_states
from tests.methods.documents import kept_by

SPANS = ((2, 5), (5, 11), (12, 14), (14, 19), (19, 20))
END, WIDTH = 20, 16


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return models.tiny("llama", num_hidden_layers=3, **sizes)


def prompt(seed: int = 0, role: str = "documents") -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(tuple(torch.randint(3, 60, (26,), generator=generator).tolist()), {role: SPANS, "end": ((22, 26),)})


@torch.no_grad()
def projected(model: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Keys, and queries averaged over the two heads of each key head, not rotated, of one text `[n w]`."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        kept[i] = (k, q)
        return heads_of(causal_map(rotate(q), rotate(k)), v)

    llama_states(model, ids, attend)
    k, q = (x[0] for x in kept[layer])
    return torch.cat([k[0], k[1]], -1), torch.cat([(q[0] + q[1]) / 2, (q[2] + q[3]) / 2], -1)


def made(layers: tuple[int, ...], m: int = 24, seed: int = 5) -> Fitted:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"encoder": (WIDTH, m), "decoder": (m, WIDTH), "center": (2, WIDTH)}
    return Fitted({f"{name}.{n}": torch.randn(s, generator=draw) * (0.05 if name == "center" else 1)
                   for n in layers for name, s in shapes.items()})  # fmt: skip


def strongest(code: list[float], active: int) -> set[int]:
    return set(sorted(range(len(code)), key=lambda f: -code[f])[:active])


def by_hand(model: Any, shown: Prompt, sae: Fitted, layers: tuple[int, ...], active: int, chunk: int) -> list[float]:
    """The most features that a token of each span shares with one query."""
    shared = torch.zeros(26 - END, END)
    for n in layers:
        encoder, decoder, (of_keys, of_queries) = (sae[f"{name}.{n}"] for name in ("encoder", "decoder", "center"))
        keys: list[set[int]] = []
        for start in range(0, END, chunk):
            ids = torch.tensor([shown.tokens[start : min(start + chunk, END)]])
            for x in projected(model, ids, n)[0]:
                keys += [strongest([float((x - of_keys) @ column) for column in encoder.T], active)]
        for i, x in enumerate(projected(model, torch.tensor([shown.tokens[END:]]), n)[1]):
            mine = strongest([float((x - of_queries) @ row) for row in decoder], active)
            for j in range(END):
                shared[i, j] += len(mine & keys[j])
    return [max(float(shared[i, j]) for i in range(26 - END) for j in range(a, b)) for a, b in SPANS]


def stays(found: Prompt, shown: Prompt, kept: list[int]) -> None:
    gone = {i for number, (a, b) in enumerate(SPANS) if number not in kept for i in range(a, b)}
    assert found.tokens == tuple(t for i, t in enumerate(shown.tokens) if i not in gone), kept
    a, b = found.roles["end"][0]
    assert found.tokens[a:b] == shown.tokens[22:]


@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_projections_are_those_before_the_rotary_embedding(model: Any, layers: tuple[int, ...] | None) -> None:
    ids = torch.tensor([prompt(1).tokens, prompt(2).tokens])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad(), heedful.attach(model, part := _Projections(layers)) as run:
        run(input_ids=ids[:1])
        run(input_ids=ids, attention_mask=mask)
        found = run[part]
    assert set(found) == set(layers or range(3))
    for n, x in found.items():
        assert x.shape == (2, 26 + 26 + 22, WIDTH)
        for row, text in ((slice(0, 26), ids[:1]), (slice(26, 52), ids[:1]), (slice(52, 74), ids[1:, 4:])):
            keys, queries = projected(model, text, n)
            assert close_model(x[0, row], keys)
            assert close_model(x[1, row], queries)


@pytest.mark.parametrize(("layers", "active", "chunk"), [((0, 1, 2), 4, 512), ((1,), 3, 7), ((2, 0), 5, 10)])
def test_spans_score_by_features_that_their_best_token_shares(
    model: Any, layers: tuple[int, ...], active: int, chunk: int
) -> None:
    method = S3Attention(layers=layers, active=active, chunk=chunk, sae=made(layers))
    for seed in range(3):
        shown = prompt(seed)
        wanted = by_hand(model, shown, made(layers), layers, active, chunk)
        found = method.scores(shown, SPANS, (END, 26), heedful.api.reader(model))
        assert close_model(found, torch.tensor(wanted))
        for room in (3, 8, 12):
            stays(heedful.arrange(model, shown, replace(method, budget=room)), shown, kept_by(wanted, room, SPANS))
        share = heedful.arrange(model, shown, replace(method, budget=0.5))
        stays(share, shown, kept_by(wanted, 9, SPANS))


def okapi(shown: Prompt) -> list[float]:
    texts = [shown.tokens[a:b] for a, b in SPANS]
    mean, out = sum(map(len, texts)) / 5, []
    for text in texts:
        total = 0.0
        for token in shown.tokens[END:]:
            n = len([1 for other in texts if token in other])
            tf = text.count(token)
            total += math.log((5 - n + 0.5) / (n + 0.5) + 1) * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(text) / mean))
        out.append(total)
    return out


def some(seed: int) -> Prompt:
    """Few words, so that spans and question share some."""
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        tuple(torch.randint(3, 12, (26,), generator=generator).tolist()), {"documents": SPANS, "end": ((22, 26),)}
    )


def test_bm25_and_what_is_fused(model: Any) -> None:
    layers = (0, 1)
    for seed in range(4):
        shown = some(seed)
        words = okapi(shown)
        assert close(bm25(shown, SPANS, (END, 26)), torch.tensor(words))
        stays(heedful.arrange(model, shown, S3Attention(8, lexical=1.0)), shown, kept_by(words, 8, SPANS))
        features = by_hand(model, shown, made(layers), layers, 4, 512)

        def unit(scores: list[float]) -> list[float]:
            return [(s - min(scores)) / (max(scores) - min(scores)) for s in scores]

        both = [0.7 * f + 0.3 * w for f, w in zip(unit(features), unit(words), strict=True)]
        method = S3Attention(8, layers=layers, active=4, lexical=0.3, sae=made(layers))
        stays(heedful.arrange(model, shown, method), shown, kept_by(both, 8, SPANS))
    assert scaled(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    assert scaled(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]


def test_the_question_stands_behind_the_span_that_ends_last(model: Any) -> None:
    for seed in range(4):
        shown = some(seed)
        turned = replace(shown, roles=dict(shown.roles) | {"documents": SPANS[::-1]})
        found = [heedful.arrange(model, one, S3Attention(8, lexical=1.0)).tokens for one in (shown, turned)]
        assert found[0] == found[1] != shown.tokens


def test_the_first_steps_of_a_fit(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [torch.tensor([prompt(seed).tokens]) for seed in range(2)]
    steps = Steps(monkeypatch, "Adam")
    method = S3Attention(layers=(1,), active=3, widen=2, tokens=20, epochs=2, rate=0.01, seed=4)
    found = heedful.fit(method, model, [{"input_ids": x} for x in ids])
    kinds = [torch.cat(pair) for pair in zip(*(projected(model, x, 1) for x in ids), strict=True)]
    assert found.sae is not None
    assert set(found.sae) == {"encoder.1", "decoder.1", "center.1"}
    centers = torch.stack([x.mean(0) for x in kinds])
    assert close_model(found.sae["center.1"], centers)
    tokens = (kinds[0] - centers[0]) / (kinds[0] - centers[0]).pow(2).mean().sqrt()
    assert len(steps.before) == 2 * 3  # 52 keys in 20s, twice
    assert steps.settings == [{"lr": 0.01}]
    draw = torch.Generator().manual_seed(5)  # the seed and the layer
    start = torch.randn(2 * WIDTH, WIDTH, generator=draw)
    start = start / start.pow(2).sum(1, keepdim=True).sqrt()
    assert close(steps.before[0][1], start)
    assert close(steps.before[0][0], start.T)
    order = torch.Generator().manual_seed(5)
    step = 0
    for _ in range(2):
        for chosen in torch.randperm(52, generator=order).split(20):
            encoder, decoder = (p.clone().requires_grad_() for p in steps.before[step])
            loss = torch.zeros(())
            for i in chosen.tolist():
                code = tokens[i] @ encoder
                best = sorted(range(2 * WIDTH), key=lambda f: -float(code[f].detach()))[:3]
                again = sum(code[f] * decoder[f] for f in best)
                loss = loss + (again - tokens[i]).pow(2).mean() / len(chosen)
            loss.backward()
            for mine, grad in zip((encoder, decoder), steps.grads[step], strict=True):
                assert mine.grad is not None
                assert close_model(mine.grad, grad)
            step += 1
    for name, last in zip(("encoder", "decoder"), steps.before[-1], strict=True):
        assert 0 < (found.sae[f"{name}.1"] - last).abs().max() < 0.02  # Adam's steps are about as long as the rate
    every = heedful.fit(S3Attention(widen=1, epochs=1), model, [{"input_ids": ids[0]}])
    assert every.sae is not None
    assert {name for name in every.sae if "encoder" in name} == {"encoder.0", "encoder.1", "encoder.2"}
    one = heedful.fit(S3Attention(layers=(0,), epochs=1), model, [{"input_ids": ids[0][:, :1]}])
    assert one.sae is not None
    assert bool(one.sae["encoder.0"].isfinite().all()), "a single key is its own mean"
    again = heedful.fit(S3Attention(widen=1, epochs=1, seed=0), model, [{"input_ids": ids[0]}])
    assert again.sae == every.sae


def test_random_features_and_few_of_them(model: Any) -> None:
    shown = prompt()
    encoders = {}
    for n in range(3):
        rows = torch.randn(4 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(7 + n))
        rows = rows / rows.norm(dim=1, keepdim=True)
        encoders |= {f"encoder.{n}": rows.T, f"decoder.{n}": rows, f"center.{n}": torch.zeros(2, WIDTH)}
    drawn = S3Attention(seed=7, active=4).scores(shown, SPANS, (END, 26), heedful.api.reader(model))
    assert close_model(drawn, torch.tensor(by_hand(model, shown, Fitted(encoders), (0, 1, 2), 4, 512)))
    few = S3Attention(layers=(0,), active=99, sae=made((0,)))  # all fire everywhere, which tells nothing
    assert few.scores(shown, SPANS, (END, 26), heedful.api.reader(model)).tolist() == [24.0] * 5


def test_neutral_changes_nothing_and_the_role_has_a_name_of_choice(model: Any) -> None:
    shown = prompt()
    assert heedful.arrange(model, shown, S3Attention.neutral()) is shown
    assert heedful.arrange(model, shown, S3Attention(18)) is shown
    other = heedful.arrange(model, prompt(role="facts"), S3Attention(role="facts", active=4, seed=0))
    assert other.tokens == heedful.arrange(model, shown, S3Attention.example()).tokens
    assert other.tokens != shown.tokens
    empty = Prompt((1, 2), {"documents": ()})
    assert heedful.arrange(model, empty, S3Attention()) is empty


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 0}, r"budget = 0"),
        ({"role": ""}, r"role = '': must name a role"),
        ({"layers": ()}, r"layers = \(\): must name one or more layers"),
        ({"layers": (1, -1)}, r"layers = \(1, -1\): must name one or more layers"),
        ({"active": 0}, r"active = 0: must be 1 or more.*48"),
        ({"widen": 0}, r"widen = 0: must be 1 or more.*4"),
        ({"chunk": 0}, r"chunk = 0: must be 1 or more.*512"),
        ({"tokens": 0}, r"tokens = 0: must be 1 or more.*512"),
        ({"epochs": 0}, r"epochs = 0: must be 1 or more.*8"),
        ({"lexical": -0.1}, r"lexical = -0\.1: must lie from 0 to 1"),
        ({"lexical": 1.1}, r"lexical = 1\.1: must lie from 0 to 1"),
        ({"rate": 0.0}, r"rate = 0\.0: must be above 0.*0\.001"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        S3Attention(**settings)
    S3Attention(1, layers=(0,), active=1, widen=1, chunk=1, tokens=1, epochs=1)


def test_errors(model: Any) -> None:
    shown = prompt()
    with pytest.raises(FieldError, match="sae = None: must be fitted"):
        heedful.arrange(model, shown, S3Attention())
    other = {"encoder.0": torch.ones(8, 4), "decoder.0": torch.ones(4, 8), "center.0": torch.ones(2, 8)}
    for sae in (made((1,)), Fitted(other), Fitted({name: x for name, x in made((0,)).items() if name != "decoder.0"})):
        with pytest.raises(FieldError, match="other layers or another model; layer 0 has keys of width 16"):
            heedful.arrange(model, shown, S3Attention(layers=(0,), sae=sae))
    with pytest.raises(FieldError, match="a question behind its last span"):
        heedful.arrange(model, Prompt(shown.tokens[:END], {"documents": SPANS}), S3Attention(seed=0))
    batch = {"input_ids": torch.tensor([shown.tokens])}
    with pytest.raises(FieldError, match=r"layers = \(3,\): must be below 3.*\(2,\)"):
        heedful.fit(S3Attention(layers=(3,)), model, [batch])
    heedful.fit(S3Attention(layers=(2,), epochs=1), model, [batch])
    with pytest.raises(FieldError, match="batches = 0: must be 1 or more"):
        heedful.fit(S3Attention(), model, [])
