"""Patching: what is put where, paths that lead past everything else, and circuits that overlap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.explaining.activation_patching import HeadEffects, _placing, patching, path_patching
from heedful.methods.explain.patch import Patch
from heedful.models import Loaded
from tests.samples import PAPER, uneven
from tests.test_diagnose_texts import characters

CLEAN = torch.tensor([[5, 17, 9, 88, 40, 23], [7, 31, 60, 90, 12, 44]])
CORRUPT = torch.tensor([[5, 17, 77, 88, 40, 23], [7, 31, 18, 90, 12, 44]])


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 50] - logits[:, -1, 60]


class Heads(heedful.Method):
    """Keeps what heads hand over."""

    paper = PAPER

    @reads(Site.HEAD_OUTPUT)
    def keep(self, heads: Tensor, call: heedful.Call) -> Cat:
        return Cat.of("x", heads)


def heads_of(model, ids: Tensor) -> Fitted:
    with heedful.attach(model, Heads()) as run, torch.no_grad():
        run(input_ids=ids)
    return Fitted({str(layer): stat.value[0] for layer, stat in run[Heads()].items()})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_heads_of_a_run_at_all_places_give_that_runs_answer_to_the_same_last_token(kind: str) -> None:
    """Heads are all that carries something from token to token."""
    model = models.tiny(kind)
    patch = Patch(heads_of(model, CLEAN))
    with torch.no_grad(), heedful.attach(model, patch) as run:
        found = run(input_ids=CORRUPT).logits
    assert close_model(found[:, -1], model(input_ids=CLEAN).logits[:, -1])
    assert not close_model(found[:, 2], model(input_ids=CLEAN).logits[:, 2])


def test_values_come_by_position_and_nothing_else_moves() -> None:
    model = models.tiny("llama", num_hidden_layers=1)
    values = Fitted({"0": torch.randn(1, 4, 5, 8)})
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(CLEAN)], 1)
    seen = {}
    stacks = {
        "plain": Heads(),
        "put": Patch(values, (1, 4, 5)).on(heads=[2]) | Heads(),
        "everywhere": Patch(values) | Heads(),
    }
    for name, stack in stacks.items():
        with heedful.attach(model, stack) as run, torch.no_grad():
            run(input_ids=torch.cat([pad, CLEAN], 1), attention_mask=mask)
        seen[name] = run[Heads()][0].value[0]
    changed = (seen["put"] != seen["plain"]).flatten(0, 1).any(0).any(-1)
    assert changed.nonzero()[:, 0].tolist() == [4, 7]  # three of padding; there is no value for position 5
    assert torch.equal(seen["put"][:, 2, [4, 7]], values["0"][:, 2, [1, 4]].expand(2, -1, -1))
    assert torch.equal(seen["put"][:, [0, 1, 3]], seen["plain"][:, [0, 1, 3]])
    changed = (seen["everywhere"] != seen["plain"]).flatten(0, 1).any(0).any(-1)
    assert changed.nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]


def test_without_values_heads_say_nothing() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, Patch().on(layers=1, heads=[3]) | Heads()) as run, torch.no_grad():
        run(input_ids=CLEAN)
    after = run[Heads()][1].value[0]
    assert not after[:, 3].any()
    assert after[:, :3].any()


def test_activation_patching_head_by_head() -> None:
    model = models.tiny("llama")
    found = patching(model, CLEAN, CORRUPT, metric)
    with torch.no_grad():
        high, low = (float(metric(model(input_ids=x).logits).mean()) for x in (CLEAN, CORRUPT))
        with heedful.attach(model, Patch(heads_of(model, CLEAN)).on(layers=1, heads=2)) as run:
            one = float(metric(run(input_ids=CORRUPT).logits).mean())
    assert (found.clean, found.corrupt) == pytest.approx((high, low))
    assert float(found.share[1, 2]) == pytest.approx((one - low) / (high - low), rel=1e-3)
    assert found.top(1)[0] == divmod(int(found.share.abs().argmax()), 4)
    some = patching(model, CLEAN, CORRUPT, metric, layers=[1], positions=(0, 1))
    assert some.share[0].isnan().all()
    assert close(some.share[1], torch.zeros(4))  # the prompts begin alike, and nothing comes from behind


@pytest.mark.parametrize("effects", [patching, path_patching])
def test_texts_are_what_their_tokens_are(effects: Callable[..., HeadEffects]) -> None:
    model, words = models.tiny("llama"), characters()
    clean, corrupt = ["a cat", "a cow"], ["a dog", "a pig"]
    ids = [torch.tensor([[ord(x) for x in text] for text in texts]) for texts in (clean, corrupt)]
    wanted = effects(model, *ids, metric)
    for found in (
        effects(model, clean, corrupt, metric, tokenizer=words),
        effects(Loaded(model, words, "tiny"), clean, corrupt, metric),
        effects(model, *(x.tolist() for x in ids), metric),
    ):
        assert torch.equal(found.share, wanted.share)
    one = effects(model, *(x[:1] for x in ids), metric)
    assert torch.equal(effects(model, "a cat", "a dog", metric, tokenizer=words).share, one.share)
    assert torch.equal(effects(model, *(x[0].tolist() for x in ids), metric).share, one.share)


def test_the_estimate_is_the_slope_of_the_effect() -> None:
    model = models.tiny("llama")
    clean, corrupt = heads_of(model, CLEAN), heads_of(model, CORRUPT)
    found = patching(model, CLEAN, CORRUPT, metric, estimate=True)

    def moved(head: tuple[int, int], by: float) -> float:
        near = Fitted({n: corrupt[n] + by * (clean[n] - corrupt[n]) for n in clean})
        with torch.no_grad(), heedful.attach(model, Patch(near).on(layers=head[0], heads=head[1])) as run:
            return float(metric(run(input_ids=CORRUPT).logits).double().mean())

    for head in ((0, 1), (1, 3)):
        slope = (moved(head, 3e-3) - moved(head, -3e-3)) / 6e-3 / (found.clean - found.corrupt)
        assert float(found.share[head]) == pytest.approx(slope, rel=0.01)


def test_positions_mean_the_same_with_and_without_an_estimate() -> None:
    """A place that is named twice is patched once."""
    model = models.tiny("llama")
    for estimate in (False, True):
        once, twice = (patching(model, CLEAN, CORRUPT, metric, positions=p, estimate=estimate) for p in ((4,), (4, 4)))
        assert close(once.share, twice.share)


def test_in_the_last_layer_the_direct_path_is_the_only_one() -> None:
    """And a sender below must not act through later heads, which activation patching lets it."""
    model = models.tiny("llama")
    direct = path_patching(model, CLEAN, CORRUPT, metric)
    back = patching(model, CORRUPT, CLEAN, metric)  # clean and corrupt change places: what is lost
    assert close_model(direct.share[1], back.share[1])
    assert not close_model(direct.share[0], back.share[0])


def test_receivers_get_what_the_sender_changes_and_pass_it_on() -> None:
    model = models.tiny("mha")
    clean, corrupt = heads_of(model, CLEAN), heads_of(model, CORRUPT)
    receivers = [(1, 0), (1, 2)]
    every = {side: path_patching(model, CLEAN, CORRUPT, metric, receivers=receivers, side=side) for side in "qkv"}
    for side in "qkv":
        assert every[side].share[1].isnan().all()
        assert not close(every[side].share[0], torch.zeros(4))

    # one head's queries by hand: layer 1's norm and projection of a stream that differs by what the sender wrote
    layers = model.model.layers
    inputs = {}
    hook = layers[1].input_layernorm.register_forward_hook(lambda m, args, out: inputs.update(x=out))
    with torch.no_grad(), heedful.attach(model, Patch(clean) | Patch(corrupt).on(layers=0, heads=3)) as run:
        run(input_ids=CLEAN)
    hook.remove()
    changed = layers[1].self_attn.q_proj(inputs["x"]).view(2, 6, 4, 8)

    def swap(m, args, out: Tensor) -> Tensor:
        new = out.view(2, 6, 4, 8).clone()
        new[:, :, [0, 2]] = changed[:, :, [0, 2]]
        return new.view(2, 6, 32)

    high, low = every["q"].clean, every["q"].corrupt
    hook = layers[1].self_attn.q_proj.register_forward_hook(swap)
    with torch.no_grad():
        wanted = (high - float(metric(model(input_ids=CLEAN).logits).mean())) / (high - low)
    hook.remove()
    assert float(every["q"].share[0, 3]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_receivers_in_two_layers_are_each_reached_from_below() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    every, upper = (path_patching(model, CLEAN, CORRUPT, metric, receivers=r) for r in ([(1, 0), (2, 3)], [(2, 3)]))
    assert every.share[2].isnan().all()
    assert close(every.share[1], upper.share[1])
    assert not close(every.share[0], upper.share[0])


def test_a_layer_with_fewer_heads_has_no_effects_beyond_them() -> None:
    found = patching(uneven(), CLEAN, CORRUPT, metric)
    assert found.share.isnan().tolist() == [[False] * 4, [False, False, True, True]]


def effects(*rows: list[float]) -> HeadEffects:
    return HeadEffects(torch.tensor(rows), 1.0, 0.0)


def test_overlap_of_circuits() -> None:
    one, other = effects([0.5, -0.9, 0.0], [0.1, float("nan"), 0.2]), effects([0.0, 0.7, 0.1], [0.0, 0.3, -0.6])
    assert one.top(3) == ((0, 1), (0, 0), (1, 2))
    assert other.top(3) == ((0, 1), (1, 2), (1, 1))
    assert one.overlap(other, 3) == pytest.approx(2 / 3)
    assert one.overlap(other, 1) == 1
    assert one.figure.values is one.share
    assert [(x.figure.low, x.figure.high) for x in (one, other)] == [pytest.approx((-y, y)) for y in (0.9, 0.7)]
    assert "0.1" in str(one)
    with pytest.raises(FieldError, match="same model"):
        one.overlap(effects([1.0]), 1)
    assert len(one.top(6)) == 5
    assert (1, 1) not in one.top(6)  # it was not tried
    for a, b in ((one, other), (other, one)):
        with pytest.raises(FieldError, match="from 1 to 5 heads, as many as both have tried"):
            a.overlap(b, 6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: patching(m, CLEAN, CORRUPT[:1], metric), "of the shape of clean"),
        (lambda m: patching(m, CLEAN, CLEAN, metric), "nothing to bring back"),
        (lambda m: patching(m, "a cat", "a dog", metric), r"tokenizer = None: is needed for a text"),
        (
            lambda m: patching(m, ["a cat", "a bird"], ["a dog", "a fish"], metric, tokenizer=characters()),
            r"patching\(\)\.clean = 'texts of 5, 6 tokens': must be of equally many tokens",
        ),
        (lambda m: patching(m, CLEAN, CORRUPT, lambda logits: logits.mean()), "one number a text"),
        (lambda m: patching(m, CLEAN, CORRUPT, metric, layers=[9]), "must lie below 2"),
        *(
            (lambda m, p=p, e=e: patching(m, CLEAN, CORRUPT, metric, positions=p, estimate=e), r"positions from 0 to 5")
            for p in ((-1,), (2, 6), ())
            for e in (False, True)
        ),
        *(
            (lambda m, r=r: path_patching(m, CLEAN, CORRUPT, metric, receivers=r), r"receivers = .*above layer 0")
            for r in ([(0, 1)], [(2, 0)], [(1, 4)], [(1, 0), (2, 0)])
        ),
        (lambda m: path_patching(m, CLEAN, CORRUPT, metric, receivers=[(1, 0), (1, -1)]), "counted from 0"),
        (lambda m: path_patching(m, CLEAN, CORRUPT, metric, receivers=[(1, 0)], layers=[1]), "above layer 1"),
        (lambda m: path_patching(m, CLEAN, CORRUPT, metric, side="o"), "must be 'q', 'k' or 'v'"),
        *(
            (
                lambda m, s=s: path_patching(m, CLEAN, CORRUPT, metric, receivers=[(1, 3)], side=s),
                rf"receivers = \[\(1, 3\)\]: must be whole groups .*'{s}'.*receivers=\[\(1, 2\), \(1, 3\)\]$",
            )
            for s in "kv"
        ),
        (lambda m: Patch(positions=(-1,)), "each must be 0 or more"),
        (lambda m: heedful.attach(m, Patch(Fitted({"0": torch.ones(1, 3, 6, 8)})))(input_ids=CLEAN), "values of a run"),
    ],
)
def test_says_what_is_wrong(call, match: str) -> None:
    with pytest.raises(FieldError, match=match):
        call(models.tiny("llama"))


def rows(ids: list[Tensor]) -> dict[str, Tensor]:
    """Texts of one batch, padded on the left."""
    most = max(x.shape[1] for x in ids)
    left = [most - x.shape[1] for x in ids]
    padded = [torch.nn.functional.pad(x, (gap, 0)) for x, gap in zip(ids, left, strict=True)]
    return {
        "input_ids": torch.cat(padded),
        "attention_mask": (torch.arange(most) >= torch.tensor(left)[:, None]).long(),
    }


@pytest.mark.parametrize(
    "effects",
    [
        patching,
        lambda *given: patching(*given, positions=(1, 2)),
        lambda *given: patching(*given, estimate=True),
        lambda *given: patching(*given, positions=(1, 2), estimate=True),
        path_patching,
        lambda *given: path_patching(*given, receivers=[(1, 0)]),
        lambda *given: path_patching(*given, receivers=[(1, 0), (1, 1)], side="v"),
    ],
    ids=["all", "places", "estimate", "places estimated", "paths", "queries", "values"],
)
def test_a_padded_batch_has_the_effects_of_its_texts_alone(effects) -> None:
    model = models.tiny("llama")
    clean, corrupt = ([ids[:1], ids[1:, 1:5]] for ids in (CLEAN, CORRUPT))
    alone = [effects(model, *pair, metric) for pair in zip(clean, corrupt, strict=True)]
    leads = [found.clean - found.corrupt for found in alone]
    expected = sum(found.share * lead for found, lead in zip(alone, leads, strict=True)) / sum(leads)
    together = effects(model, rows(clean), rows(corrupt), metric)
    assert close_model(together.share.nan_to_num(), expected.nan_to_num())
    assert together.share.abs().nan_to_num().max() > 0


def test_estimates_of_single_places_add_up() -> None:
    model = models.tiny("llama")
    whole = patching(model, CLEAN, CORRUPT, metric, estimate=True).share
    each = [patching(model, CLEAN, CORRUPT, metric, positions=(p,), estimate=True).share for p in range(CLEAN.shape[1])]
    assert close_model(sum(each), whole)
    assert len({x.abs().sum().item() for x in each}) > 1


@pytest.mark.parametrize("packed", ["clean", "corrupt"])
def test_texts_that_share_a_row_are_refused_and_padding_may_have_any_place(packed: str) -> None:
    model, pad = models.tiny("llama"), torch.zeros(2, 2, dtype=torch.long)
    texts = {"clean": CLEAN, "corrupt": CORRUPT}
    given = {name: {"input_ids": ids} for name, ids in texts.items()}
    given[packed] = {"input_ids": texts[packed], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with pytest.raises(FieldError, match="give each text a row of its own, padded"):
        patching(model, given["clean"], given["corrupt"], metric)
    with pytest.raises(FieldError, match="give each text a row of its own, padded"):
        path_patching(model, given["clean"], given["corrupt"], metric)
    mask = torch.cat([pad, torch.ones_like(CLEAN)], 1)
    places = torch.cat([pad + 1, torch.arange(6).expand(2, -1)], 1)
    padded = {
        name: {"input_ids": torch.cat([pad, ids], 1), "attention_mask": mask, "position_ids": places}
        for name, ids in texts.items()
    }
    found = patching(model, padded["clean"], padded["corrupt"], metric)
    assert close_model(found.share, patching(model, CLEAN, CORRUPT, metric).share)


def test_what_is_kept_stands_by_text_position_however_long_the_text_is() -> None:
    text = torch.arange(19) >= torch.tensor([[0], [4]])
    bare = Bare(text=text)
    found = _placing(Site.QUERY).keep(bare.q, bare.call).value[0]  # type: ignore[attr-defined]
    assert torch.equal(found[0], bare.q[0])
    assert torch.equal(found[1, :, :15], bare.q[1, :, 4:])
    assert not bool(found[1, :, 15:].any())
