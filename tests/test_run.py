"""Runs on tiny models: neutral exit, readings, guards, parameters, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import heedful
from heedful import attach, attached, edit, fit
from heedful.catalogue import entries
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError, HeedfulError, InactiveWarning, NotEntered, RefusedModel, StatisticError
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, at
from heedful.methods import (
    AttentionSorting,
    AvisC,
    HeadCircuits,
    PruneHeads,
    QFilters,
    RefAM,
    SinkRate,
    SinkWindow,
    TempScale,
)
from heedful.tiny import tiny

from .samples import PAPER, Forget, Gate, Keep, Narrow, Scale, Shares, Zero

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama", attn_implementation="eager")


@torch.no_grad()
def logits(model: object, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**{"input_ids": IDS, **inputs}).logits  # type: ignore[operator]


def test_a_run_acts_reads_and_leaves_no_trace(model: nn.Module) -> None:
    before, native = fingerprint(model), logits(model)
    with attach(model, Scale() | Shares()) as run:
        assert not torch.equal(logits(run), native)
        shares = run[Shares()]
        assert repr(shares) == "Readings(2 layers of Mean)"
        assert all(0 < float(x) <= 1 for stat in shares.values() for x in stat.value)
    assert fingerprint(model) == before
    assert torch.equal(logits(model), native)
    assert list(run.answers()) == [Shares()]


def test_readings_are_those_of_the_map_itself(model: nn.Module) -> None:
    with torch.no_grad():
        maps = model(input_ids=IDS, output_attentions=True).attentions
    with attach(model, Shares() | Keep(), backend="reference") as run:
        assert torch.equal(logits(run), logits_under_nothing(model, run))
    for layer, full in enumerate(maps):
        assert torch.equal(run[Keep()][layer].value[0], full)
        assert close_model(run[Shares()][layer].value.float(), full[..., 0].mean((0, 2)))


def logits_under_nothing(model: nn.Module, run: heedful.Run) -> torch.Tensor:
    with run.paused():
        return logits(model)


def test_an_exception_inside_the_model_leaves_no_trace(model: nn.Module) -> None:
    before = fingerprint(model)
    with pytest.raises(IndexError), attach(model, Scale()) as run:
        run(input_ids=torch.tensor([[10_000]]))
    assert fingerprint(model) == before


def test_closing_twice_and_using_a_closed_run(model: nn.Module) -> None:
    run = attach(model, Shares())
    run.close()
    run.close()
    with pytest.raises(FieldError, match=r"this run has ended; attach again"):
        run(input_ids=IDS)
    with pytest.raises(StatisticError, match="has read nothing yet"):
        run[Shares()]


def test_what_found_nothing_to_read_in_a_run_is_told_so(model: nn.Module) -> None:
    for part in (RefAM(), SinkRate().when(phase="decode")):
        with torch.no_grad(), attach(model, part, roles={"marked": ((0, 2),)}) as run:
            with pytest.raises(StatisticError, match="has read nothing yet: run the model first"):
                run[part]
            run(input_ids=IDS)
            with pytest.raises(StatisticError, match="has read nothing of what ran: it rests there, or no layer"):
                run[part]


def test_a_model_takes_one_run(model: nn.Module) -> None:
    with attach(model, Shares()), pytest.raises(FieldError, match="a run is attached already"):
        attach(model, Scale())
    attach(model, Scale()).close()


def test_a_run_whose_name_is_lost_is_found_and_closed(model: nn.Module) -> None:
    assert attached(model) is None
    plain = model(input_ids=IDS).logits
    attach(model, Scale())
    found = attached(model.model)
    assert found is not None
    assert found is attached(nn.ModuleList([model]))
    assert found.stack == Stack((Scale(),))
    found.close()
    assert attached(model) is None
    assert torch.equal(model(input_ids=IDS).logits, plain)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1).eval()
    other = attach(encoder, Scale())  # whose layers are not known yet
    assert attached(encoder) is other
    other.close()
    assert attached(encoder) is None


class Deep(Method):
    """A method with a setting called as what `on` takes."""

    paper = PAPER
    layers: int = 99

    @at(Site.QUERY)
    def double(self, query: Tensor, call: Call) -> Tensor:
        return 2 * query


class Named(Deep):
    """Its own word for layers, which names none by number."""

    paper = PAPER
    layers: tuple[str, ...] = ("first", "last")


def test_a_field_may_be_called_layers(model: nn.Module) -> None:
    with attach(model, Deep()) as run:
        assert run.difference(input_ids=IDS) > 0
    with pytest.raises(FieldError, match="must be below 2, the layers served"):
        attach(model, Deep().on(layers=2))
    with attach(model, Named()) as run:
        assert run.difference(input_ids=IDS) > 0


def test_a_stack_may_be_spelled(model: nn.Module) -> None:
    with attach(model, "sinkwindow(1, 4) | sinkrate") as run:
        assert run.stack == SinkWindow(1, 4) | SinkRate()
    with pytest.raises(HeedfulError, match=r"Did you mean SinkWindow\?"):
        attach(model, "sinkwindo")
    with pytest.raises(FieldError, match=r"attach\(\)\.what = .*cannot be joined"):
        attach(model, "pruneheads|sinkrate")
    for nothing in ("", " | "):
        with pytest.raises(FieldError, match="names no method"):
            attach(model, nothing)
    for half in ("sinkrate |", "| sinkrate", "sinkrate || sinkwindow"):
        with pytest.raises(FieldError, match=r"attach\(\)\.what = .*names no method beside a \|; for example"):
            attach(model, half)
    with pytest.raises(HeedfulError, match=r"a stack holds methods, not PruneHeads.*, which goes to heedful\.operate"):
        attach(model, "pruneheads")


def test_what_goes_elsewhere_is_told_where(model: nn.Module) -> None:
    for kind, place in (
        (PruneHeads, "operate"),
        (AttentionSorting, "arrange"),
        (AvisC, "decode"),
        (HeadCircuits, "fit"),
    ):
        with pytest.raises(FieldError, match=rf"Stack or str, and this goes to heedful\.{place}\(\)"):
            attach(model, kind())
    with pytest.raises(FieldError, match=r"and this is a class: TempScale\(\)"):
        attach(model, TempScale)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"backend = TempScale.*: must be str; for example"):  # nothing goes there
        attach(model, Scale(), backend=TempScale())  # type: ignore[arg-type]


def test_a_fit_to_nothing_says_so_but_where_weights_alone_are_looked_at(model: nn.Module) -> None:
    with pytest.raises(FieldError, match=r"QFilters\.batches = 0: must be 1 or more; for example"):
        fit(QFilters(), model, [])
    of_weights, told = [], {}
    for name, kind in entries().items():
        start = kind.example()
        try:
            of_weights += [name] if fit(start, model, []) is not start else []
        except FieldError as refused:
            told[name] = str(refused)
    assert [text for name, text in told.items() if f"{name}.batches = " not in text] == []
    assert of_weights == [
        "CompositionScore", "DIMAP", "GEM", "HeadCircuits", "ImageDecomposition", "MAPS",
        "SparseAttentionDecomposition", "WeibullWeights",
    ]  # fmt: skip


def test_untouched_layers_keep_the_models_own_attention(model: nn.Module) -> None:
    with attach(model, Scale().on(layers=1)) as run:
        logits(run)
    assert run.activity().backends == {0: "the model's own (eager)", 1: "sdpa"}
    with attach(model, Stack()) as run:
        assert torch.equal(logits(run), logits_under_nothing(model, run))


def test_a_stack_that_changed_nothing_is_reported(model: nn.Module) -> None:
    told = r"this run changed nothing with Scale\(by=1.0\) at HEAD_OUTPUT"
    with pytest.warns(InactiveWarning, match=told), attach(model, Scale(1.0)) as run:
        logits(run)
    assert not run.activity().active
    assert "changed nothing: Scale(by=1.0) at HEAD_OUTPUT" in str(run.activity())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, Scale()) as run:
            logits(run)
    with pytest.warns(InactiveWarning, match="at CACHE, which was never reached"), attach(model, Forget()) as run:
        run(input_ids=IDS, use_cache=False)
    with attach(model, Scale()) as run:
        logits(run)
    assert str(run.activity()).startswith("active: 2 of 2 layers entered, computed by sdpa")


def test_a_mask_step_is_judged_by_what_it_adds_itself(model: nn.Module) -> None:
    told = r"this run changed nothing with Narrow\(size=9\).* at MASK"
    for stack in (Narrow(3) | Narrow(9), Narrow(3).on(heads=[0]) | Narrow(9).on(heads=[0])):
        with pytest.warns(InactiveWarning, match=told), attach(model, stack) as run:
            logits(run)
        assert len(run.inactive) == 1
    with attach(model, Narrow(9) | Narrow(3)) as run:
        logits(run)
    assert run.inactive == ()


def test_density_cache_and_nan_are_seen(model: nn.Module) -> None:
    with attach(model, Narrow(3) | Forget(4)) as run, torch.no_grad():
        run(input_ids=IDS, use_cache=True)
    seen = run.activity()
    kept = (1 + 2 + 3 + 4 * 9) / 144
    assert seen.density == {0: pytest.approx(kept), 1: pytest.approx(kept)}
    assert seen.kept[0] == (2 * (4 + 5), 2 * 2 * 12)
    assert not seen.nan
    assert "cache entries kept: 36 of 96" in str(seen)
    assert f"pairs computed in the largest call: {kept:.1%} of its queries times keys" in str(seen)
    unlike = replace(seen, density={0: 0.25, 1: 0.5})
    assert "largest call: 25.0% to 50.0%, by layer, of its queries times keys" in str(unlike)
    broken = edit(Site.HEAD_OUTPUT, lambda heads, call: heads * float("nan"))
    with attach(model, broken) as run:
        logits(run)
    assert run.activity().nan


def test_the_difference_from_the_unedited_model(model: nn.Module) -> None:
    with attach(model, Zero()) as run:
        found = run.difference(input_ids=IDS)
        assert found > 1e-3
        assert str(found) == f"{float(found):.3g} of the largest output"
        assert f"{found:.1f}" == f"{float(found):.1f}"
        assert fingerprint(model) != ""
    with attach(model, Shares(), backend="reference") as run:
        assert run.difference(input_ids=IDS) == 0.0


def test_statistics_save_load_and_merge(model: nn.Module, tmp_path: Path) -> None:
    runs = []
    for row in (slice(0, 1), slice(1, 2), slice(0, 2)):
        with attach(model, Shares()) as run:
            logits(run, input_ids=IDS[row])
        runs.append(run)
    path = runs[1].save(tmp_path / "half.safetensors")
    runs[0].merge(path)
    for layer in range(2):
        assert close_model(runs[0][Shares()][layer].value.float(), runs[2][Shares()][layer].value.float())
    for another in (Scale(), Shares() | Scale(), Shares().on(layers=0), SinkRate()):
        with attach(model, another) as other, pytest.raises(StatisticError, match="comes from another stack"):
            other.merge(path)


def test_what_two_settings_of_a_reader_found_does_not_mix(model: nn.Module, tmp_path: Path) -> None:
    with attach(model, SinkRate(0.3)) as run:
        logits(run)
    path = run.save(tmp_path / "some.safetensors")
    with attach(model, SinkRate(0.9)) as other, pytest.raises(StatisticError, match=r"epsilon=0\.3.*epsilon=0\.9"):
        other.merge(path)


def test_a_reader_before_an_edit_and_again_after_it(model: nn.Module) -> None:
    halved = edit(Site.PATTERN, lambda weights, call: weights / 2)
    with attach(model, Keep() | halved | Keep()) as run:
        logits(run)
        before, after = run[0], run[2]
        for layer in range(2):
            assert torch.equal(before[layer].value[0], 2 * after[layer].value[0])
        for ask in (lambda: run[Keep()], run.answers):
            with pytest.raises(FieldError, match=r"at the places \[0, 2\]"):
                ask()
        with pytest.raises(FieldError, match="or its place there"):
            run[3]


def test_learned_parameters_train_and_are_saved(model: nn.Module) -> None:
    before = fingerprint(model)
    run = attach(model, Gate())
    assert len(run.parameters()) == 2
    names = [n for n, _ in model.named_parameters() if "heedful" in n]
    assert names == [f"model.layers.{i}.self_attn.heedful_Gate_0_gate" for i in range(2)]
    torch.optim.SGD(run.parameters(), lr=1.0).zero_grad()
    run(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in run.parameters()]
    assert all(g is not None and bool(g.any()) for g in grads)
    with torch.no_grad():
        run.parameters()[0].fill_(0.25)
    state = run.state_dict()
    run.close()
    model.zero_grad(set_to_none=True)
    assert fingerprint(model) == before
    with attach(model, Gate()) as again:
        again.load_state_dict(state)
        assert torch.equal(again.parameters()[0], torch.full((4,), 0.25))
        with pytest.raises(FieldError, match="names must be exactly those of this stack"):
            again.load_state_dict({"x": torch.ones(1)})
        logits(again)


def test_asking_for_what_is_not_there(model: nn.Module) -> None:
    with attach(model, Scale()) as run:
        logits(run)
        with pytest.raises(FieldError, match="must be a part of the stack"):
            run[Shares()]
        with pytest.raises(FieldError, match="reads nothing"):
            run[Scale()]


def test_models_that_cannot_be_served_are_refused() -> None:
    with attach(nn.Linear(2, 2), Scale()) as run, pytest.raises(RefusedModel, match="Linear calls no attention"):
        run(torch.ones(1, 2))


def test_a_layer_that_goes_its_own_way_is_noticed(model: nn.Module) -> None:
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **_: (hidden_states, None)  # type: ignore[method-assign]
    told = r"layers.1.self_attn \(LlamaAttention\) ran, but its attention did not pass"
    with pytest.raises(NotEntered, match=told), attach(model, Scale()) as run:
        run(input_ids=IDS)


def test_roles_reach_a_method(model: nn.Module) -> None:

    from heedful import Method, Site
    from heedful.authoring import at

    from .samples import PAPER

    class Mark(Method):
        """Scales marked values."""

        paper = PAPER

        @at(Site.VALUE)
        def mark(self, v: Tensor, call: Call) -> Tensor:
            return v * (1 + call.marked("image"))[..., None]

    with attach(model, Mark(), roles={"image": ((2, 4), (6, 7))}) as run:
        logits(run)
    assert run.activity().active
    with pytest.raises(FieldError, match="has no spans named 'image'"), attach(model, Mark()) as run:
        logits(run)


@pytest.mark.parametrize("verb", ["__call__", "generate", "difference"])
def test_a_text_is_refused_where_tokens_are_read(model: nn.Module, verb: str) -> None:
    with attach(model, Scale()) as run, pytest.raises(FieldError, match=r"reads no text; .*inputs=\*\*tokenizer\(text"):
        getattr(run, verb)("Paris is the capital of")


@pytest.mark.parametrize("verb", ["__call__", "generate", "difference"])
def test_all_that_a_tokenizer_gives_is_refused_as_one_argument(model: nn.Module, verb: str) -> None:
    given = BatchEncoding({"input_ids": torch.ones(1, 4, dtype=torch.long)})
    with attach(model, Scale()) as run, pytest.raises(FieldError, match=r"a BatchEncoding: .*unpack them with \*\*; "):
        getattr(run, verb)(given)
