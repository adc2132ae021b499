"""FocusDirections: directions added to queries and keys, and learned from attention mass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.focus_directions import FocusDirections, _Mass
from tests.by_hand import Steps, Turn, causal_map, heads_of, llama_states

ROLES = {"relevant": ((3, 6),)}


def _directions(layer: int = 1) -> Fitted:
    draw = torch.Generator().manual_seed(1)
    q = torch.zeros(4, 8)
    q[2] = 3 * torch.randn(8, generator=draw)
    return Fitted({f"q.{layer}": q, f"k.{layer}": torch.randn(2, 8, generator=draw)})


def test_directions_are_biases_of_the_projections() -> None:
    """Before rotary embedding: what q_proj and k_proj would do with these biases, also with a cache and padding."""
    model, other = (models.tiny("llama", attention_bias=True) for _ in range(2))
    directions, alpha = _directions(), 0.7
    with torch.no_grad():
        for side in ("q", "k"):
            bias = other.get_submodule(f"model.layers.1.self_attn.{side}_proj").bias
            bias += alpha * directions[f"{side}.1"].flatten()
        ids = models.tiny_inputs(model, length=15)["input_ids"]
        padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
        mask = (padded > 0).long()
        native, wanted = model(input_ids=ids).logits, other(input_ids=ids).logits
        with attach(model, FocusDirections(alpha, directions=directions)) as run:
            assert close_model(run(input_ids=ids).logits, wanted)
            assert close_model(run(input_ids=padded, attention_mask=mask).logits[:, 4:], wanted)
            first = run(input_ids=ids[:, :9], use_cache=True)
            second = run(input_ids=ids[:, 9:14], **{CACHE: first[CACHE]})
            third = run(input_ids=ids[:, 14:], **{CACHE: second[CACHE]})
    assert close_model(torch.cat([first.logits, second.logits, third.logits], 1), wanted)
    assert not close_model(native, wanted)


def test_without_rotary_embedding_softmax_forgets_the_keys_direction() -> None:
    model, one = models.tiny("gpt2"), _directions()
    key = torch.randn(4, 8)
    logits = []
    with torch.no_grad():
        for k in (key, -2 * key):
            method = FocusDirections(0.5, directions=Fitted({"q.1": one["q.1"], "k.1": k}))
            with attach(model, method, backend="reference") as run:
                logits.append(run(**models.tiny_inputs(model, length=15)).logits)
    assert close_model(logits[0], logits[1])


def test_the_formula() -> None:
    """Without rotary embedding, against scores by hand: (q + alpha d_Q)(k + alpha d_K); other heads untouched."""
    from heedful.conformance.bare import Bare

    bare, directions = Bare(), _directions(layer=0)
    heads, _ = bare.run(FocusDirections(0.5, directions=directions), "reference")
    plain, _ = bare.run(FocusDirections(0.0), "reference")
    q = bare.q + 0.5 * directions["q.0"][:, None]
    k = (bare.k + 0.5 * directions["k.0"][:, None]).repeat_interleave(2, 1)
    scores = (q @ k.mT * bare.call.scale).masked_fill(~torch.ones(19, 19, dtype=torch.bool).tril(), float("-inf"))
    assert close(heads, scores.softmax(-1) @ bare.v.repeat_interleave(2, 1))
    assert close(heads[:, [0, 1, 3]], plain[:, [0, 1, 3]])
    assert not close(heads[:, 2], plain[:, 2])


@pytest.mark.parametrize("rows", [2, 64])
def test_mass_is_the_last_tokens_weight_on_the_relevant_span(rows: int) -> None:
    model = models.tiny("llama", attn_implementation="eager")
    ids = models.tiny_inputs(model, batch=1, length=12)["input_ids"]
    with torch.no_grad():
        wanted = [a[0, :, -1, 3:6].sum(-1) for a in model(input_ids=ids, output_attentions=True).attentions]
        with attach(model, _Mass(), roles=ROLES, backend="tiled", tile_rows=rows) as run:
            run(input_ids=ids)
            pad = torch.zeros(1, 4, dtype=torch.long)
            for parts in ((pad, ids), (ids, pad)):
                whole = torch.cat(parts, 1)
                run(input_ids=whole, attention_mask=(whole > 0).long())
    for layer, mass in run[_Mass()].items():
        assert close_model(mass, wanted[layer])


def test_a_fit_raises_the_mass_and_leaves_the_model_alone() -> None:
    model = models.tiny("llama")
    batches = [{**models.tiny_inputs(model, seed=i), "roles": ROLES} for i in range(3)]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    method = fit(FocusDirections(alpha=1.0, heads=2, epochs=5, rate=0.1), model, batches)
    assert method == fit(FocusDirections(alpha=1.0, heads=2, epochs=5, rate=0.1), model, batches)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert method.directions is not None
    chosen = [(int(n[2:]), i) for n, d in method.directions.items() if n[0] == "q" for i in range(4) if d[i].any()]
    assert len(chosen) == 2
    assert all(bool(d.any()) for d in method.directions.values())
    masses = []
    for part in (_Mass(), method | _Mass()):
        with torch.no_grad(), attach(model, part, roles=ROLES) as run:
            for batch in batches:
                run(input_ids=batch["input_ids"])
            masses.append(sum(float(run[_Mass()][layer][i]) for layer, i in chosen))
    assert masses[1] > masses[0]


def test_the_first_step_goes_down_minus_the_log_of_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    ids = models.tiny_inputs(model, length=10)["input_ids"]
    q0, k0 = ([torch.zeros(h, 8, requires_grad=True) for _ in range(2)] for h in (4, 2))
    masses: dict[tuple[int, int], Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        weights = causal_map(turn(q + q0[layer][:, None]), turn(k + k0[layer][:, None]))
        for h in range(4):
            masses[layer, h] = sum(weights[b, h, -1, j] for b in range(2) for j in range(3, 6)) / 2
        return heads_of(weights, v)

    llama_states(model, ids, attend)
    chosen = sorted(masses, key=lambda at: -float(masses[at].detach()))[:3]
    loss = -sum(masses[at].log() for at in chosen) / 3
    wanted = torch.autograd.grad(loss, [x for pair in zip(q0, k0, strict=True) for x in pair], allow_unused=True)
    wanted = [torch.zeros(1) if x is None else x for x in wanted]
    method = fit(FocusDirections(heads=3, epochs=1, rate=0.01), model, [{"input_ids": ids, "roles": ROLES}])
    layers = sorted({layer for layer, _ in chosen})
    assert method.directions is not None
    assert sorted({int(name[2:]) for name in method.directions}) == layers
    assert kept.settings == [{"lr": 0.01, "eps": 1e-4, "weight_decay": 0.0}]
    mine = {(tuple(x.shape), i): x for i, x in enumerate(kept.grads[0])}
    assert len(mine) == 2 * len(layers)
    for (_, i), found in mine.items():
        layer, side = layers[i // 2], i % 2
        want = wanted[2 * layer + side].clone()
        rows = {h * len(want) // 4 for n, h in chosen if n == layer}
        for row in range(len(want)):
            want[row] *= row in rows  # other heads' directions do not learn
        assert close_model(found, want), (layer, side)
    assert kept.before[0][0].count_nonzero() == 0


def test_neutral_is_the_model_itself_bit_for_bit() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        native = model(**inputs).logits
        with (
            pytest.warns(match="changed nothing"),
            attach(model, FocusDirections.neutral(), backend="reference") as run,
        ):
            assert torch.equal(run(**inputs).logits, native)


@pytest.mark.parametrize("tile_rows", [1, 5])
def test_tiles_agree(tile_rows: int) -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model, length=19)
    stack = FocusDirections.example() | _Mass()
    found = []
    with torch.no_grad():
        for backend, rows in (("reference", None), ("tiled", tile_rows)):
            with attach(model, stack, backend=backend, tile_rows=rows, roles=ROLES) as run:
                found.append((run(**inputs).logits, run[_Mass()][1]))
    assert close_model(found[1][0], found[0][0])
    assert close_model(found[1][1], found[0][1])


def test_errors_say_what_to_do() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with pytest.raises(FieldError, match=r"must be fitted with heedful\.fit"), attach(model, FocusDirections()) as run:
        run(**inputs)
    for wrong in (Fitted({"q.0": torch.zeros(9, 64)}), _directions(layer=7)):
        method = FocusDirections(directions=wrong)
        with pytest.raises(FieldError, match="was fitted to another model"), attach(model, method) as run:
            run(**inputs)
    for batches in ([], [inputs]):
        with pytest.raises(FieldError, match='roles naming "relevant"'):
            fit(FocusDirections(), model, batches)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": float("nan")}, r"FocusDirections\.alpha"),
        ({"heads": 0}, r"FocusDirections\.heads = 0"),
        ({"epochs": 0}, r"FocusDirections\.epochs = 0"),
        ({"rate": 0.0}, r"FocusDirections\.rate"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        FocusDirections(**settings)


def test_the_mass_is_a_mean_over_texts() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    ids = models.tiny_inputs(model, batch=3, length=12)["input_ids"]
    with torch.no_grad(), attach(model, _Mass(), roles=ROLES) as run:
        wanted = [a[:, :, -1, 3:6].sum(-1).mean(0) for a in model(input_ids=ids, output_attentions=True).attentions]
        run(input_ids=ids[:2])
        run(input_ids=ids[2:])
    for layer, mass in run[_Mass()].items():
        assert close_model(mass, wanted[layer])


def test_random_directions_are_the_seeds_own() -> None:
    from heedful.conformance.bare import Bare

    bare = Bare()
    for side, place in (("q", 0), ("k", 1)):
        for layer in (0, 1):
            x = torch.zeros(2, 4 - 2 * place, 5, 8)
            found = FocusDirections(seed=3)._direction(x, side, replace(bare.call, layer=layer))
            draw = torch.Generator().manual_seed(2 * (4099 * 3 + layer) + place)
            assert torch.equal(found, torch.randn(4 - 2 * place, 8, generator=draw))


def test_a_cropped_text_goes_on_from_where_it_was_cropped() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=15)["input_ids"]
    with torch.no_grad(), attach(model, FocusDirections(0.7, directions=_directions())) as run:
        wanted = run(input_ids=torch.cat([ids[:, :6], ids[:, 10:]], 1)).logits
        out = run(input_ids=ids[:, :9], use_cache=True)
        out[CACHE].crop(-3)
        assert close_model(run(input_ids=ids[:, 10:], **{CACHE: out[CACHE]}).logits, wanted[:, 6:])
