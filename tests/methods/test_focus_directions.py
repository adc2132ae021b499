"""FocusDirections: directions added to queries, and learned from attention mass."""

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
    q = torch.zeros(4, 8)
    q[2] = 3 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    return Fitted({f"q.{layer}": q})


def test_directions_are_added_behind_rotary_embedding() -> None:
    """As the authors' model code has it, also with a cache and padding; their keys' direction changes nothing."""
    model = models.tiny("llama")
    directions, alpha = _directions(), 0.7
    ids = models.tiny_inputs(model, length=15)["input_ids"]
    keys = torch.randn(4, 1, 8)  # one for each query head, on repeated keys

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        q, k, v = turn(q), turn(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if layer == 1:
            q, k = q + alpha * directions["q.1"][:, None], k + alpha * keys
        return heads_of(causal_map(q, k), v)

    with torch.no_grad():
        wanted = model.lm_head(llama_states(model, ids, attend))
        native = model(input_ids=ids).logits
        padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
        with attach(model, FocusDirections(alpha, directions=directions)) as run:
            assert close_model(run(input_ids=ids).logits, wanted)
            mask = (padded > 0).long()
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            found = run(input_ids=padded, attention_mask=mask, position_ids=places).logits
            assert close_model(found[:, 4:], wanted)
            first = run(input_ids=ids[:, :9], use_cache=True)
            second = run(input_ids=ids[:, 9:], **{CACHE: first[CACHE]})
    assert close_model(torch.cat([first.logits, second.logits], 1), wanted)
    assert not close_model(native, wanted)


def test_the_formula() -> None:
    """Without rotary embedding, against scores by hand: (q + alpha d) k; other heads untouched."""
    from heedful.conformance.bare import Bare

    bare, directions = Bare(), _directions(layer=0)
    heads, _ = bare.run(FocusDirections(0.5, directions=directions), "reference")
    plain, _ = bare.run(FocusDirections(0.0), "reference")
    q = bare.q + 0.5 * directions["q.0"][:, None]
    scores = q @ bare.k.repeat_interleave(2, 1).mT * bare.call.scale
    scores = scores.masked_fill(~torch.ones(19, 19, dtype=torch.bool).tril(), float("-inf"))
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
    method = fit(FocusDirections(alpha=1.0, count=2, epochs=5, rate=0.1), model, batches)
    assert method == fit(FocusDirections(alpha=1.0, count=2, epochs=5, rate=0.1), model, batches)
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


@pytest.mark.parametrize("response", [None, (7, 9)])
def test_each_layers_first_step_goes_down_minus_the_mass(
    monkeypatch: pytest.MonkeyPatch, response: tuple[int, int] | None
) -> None:
    """By the authors' training code: of each layer alone, the mean over chosen heads and over the response's rows."""
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    ids = models.tiny_inputs(model, length=10)["input_ids"]
    asking = range(*response) if response else [9]
    given = [torch.zeros(4, 8, requires_grad=True) for _ in range(2)]

    def masses(learning: int) -> dict[tuple[int, int], Tensor]:
        found: dict[tuple[int, int], Tensor] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
            added = given[layer][:, None] if layer == learning else 0.0
            weights = causal_map(turn(q) + added, turn(k).repeat_interleave(2, 1))
            for h in range(4):
                each = [weights[b, h, i, j] for b in range(2) for i in asking for j in range(3, 6)]
                found[layer, h] = sum(each) / (2 * len(asking))
            return heads_of(weights, v)

        llama_states(model, ids, attend)
        return found

    plain = masses(-1)
    chosen = sorted(plain, key=lambda at: -float(plain[at].detach()))[:5]
    roles = ROLES if response is None else {**ROLES, "response": (response,)}
    method = fit(FocusDirections(count=5, epochs=1, rate=0.01), model, [{"input_ids": ids, "roles": roles}])
    layers = list(dict.fromkeys(layer for layer, _ in chosen))  # each learns once, the layer of the best head first
    assert method.directions is not None
    assert set(method.directions) == {f"q.{layer}" for layer in layers}
    assert kept.settings == [{"lr": 0.01}] * len(layers)
    for layer, grads in zip(layers, kept.grads, strict=True):
        mine = [h for n, h in chosen if n == layer]
        loss = -sum(masses(layer)[layer, h] for h in mine) / len(mine)
        (wanted,) = torch.autograd.grad(loss, [given[layer]])
        assert close_model(grads[0], wanted)
        assert {h for h in range(4) if bool(method.directions[f"q.{layer}"][h].any())} == set(mine)
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
        ({"count": 0}, r"FocusDirections\.count = 0"),
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
    for layer in (0, 1):
        found = FocusDirections(seed=3)._direction(torch.zeros(2, 4, 5, 8), replace(bare.call, layer=layer))
        assert torch.equal(found, torch.randn(4, 8, generator=torch.Generator().manual_seed(4099 * 3 + layer)))


def test_a_cropped_text_goes_on_from_where_it_was_cropped() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=15)["input_ids"]
    with torch.no_grad(), attach(model, FocusDirections(0.7, directions=_directions())) as run:
        wanted = run(input_ids=torch.cat([ids[:, :6], ids[:, 10:]], 1)).logits
        out = run(input_ids=ids[:, :9], use_cache=True)
        out[CACHE].crop(-3)
        assert close_model(run(input_ids=ids[:, 10:], **{CACHE: out[CACHE]}).logits, wanted[:, 6:])
