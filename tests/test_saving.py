"""Nothing trained is lost: a model is saved with what is attached to it, and comes back with it or not at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from transformers import LlamaForCausalLM

import heedful
from heedful import attach, catalogue, load, models
from heedful.adapters.saving import MARK, TENSORS
from heedful.conformance import check
from heedful.conformance.subjects import tiny_model
from heedful.core.errors import CatalogueError, FieldError, ModelError, WriteError
from heedful.core.fitted import Fitted
from heedful.core.method import Stack, as_stack
from heedful.methods import (
    MALA,
    DuoAttention,
    DynamicConv,
    GatedHeads,
    Loki,
    MixtureOfHeads,
    QFilters,
    SigmoidAttention,
    SinkRate,
    SteeringVector,
    TempScale,
)  # fmt: skip

from . import apart
from .samples import Gate, Scale

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
IN_ANOTHER_PROCESS = """
import sys, torch, heedful
from safetensors.torch import load_file, save_file
torch.set_num_threads(int(sys.argv[1]))
ids = load_file("ids.safetensors")["ids"]
for folder in sys.argv[2:]:
    with heedful.load(folder) as run, torch.no_grad():
        save_file({"logits": run(input_ids=ids).logits}, f"{folder}/answer.safetensors")
"""


@pytest.fixture
def model() -> Any:
    return models.tiny("llama").eval()


def trained(model: nn.Module, what: Any, steps: int = 3) -> heedful.Run:
    """A run whose parameters, and all weights of the model, have been trained a little."""
    run = attach(model, what)
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        descent.zero_grad()
        run(input_ids=IDS, labels=IDS).loss.backward()
        descent.step()
    return run


@torch.no_grad()
def logits(run: Any) -> Tensor:
    return run(input_ids=IDS).logits


def fitted(method: Any, model: nn.Module) -> Any:
    return heedful.fit(method, model, [{"input_ids": IDS, "labels": IDS}])


def steering() -> SteeringVector:
    return SteeringVector(vectors=Fitted({f"v.{i}": torch.randn(32) for i in range(2)}))


def saved(folder: Path, what: Any = None) -> Tensor:
    """The logits of a tiny model that is saved to a folder with something attached."""
    model = models.tiny("llama").eval()
    with trained(model, GatedHeads() if what is None else what) as run:
        model.save_pretrained(folder)
        return logits(run)


def test_a_fresh_process_answers_bit_for_bit(tmp_path: Path) -> None:
    stacks: dict[str, Any] = {
        "gates": GatedHeads(), "mala": MALA(), "moh": MixtureOfHeads(1, 2), "conv": DynamicConv().on(layers=1),
        "sigmoid": SigmoidAttention(), "joined": SinkRate() | GatedHeads().on(heads=[1, 2]) | TempScale(0.9),
        "prefill": TempScale(0.5).when("prefill"), "loki": fitted(Loki(), models.tiny("llama")),
        "duo": fitted(DuoAttention(sinks=1, window=2), models.tiny("llama")),
        "steered": steering() | GatedHeads(),
    }  # fmt: skip
    wanted = {name: saved(tmp_path / name, what) for name, what in stacks.items()}
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    told = apart.script(IN_ANOTHER_PROCESS, str(torch.get_num_threads()), *stacks, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "UNEXPECTED" not in told.stderr
    for name in stacks:
        assert torch.equal(load_file(tmp_path / name / "answer.safetensors")["logits"], wanted[name]), name


@pytest.mark.parametrize("method", [DuoAttention(), Loki(), QFilters()], ids=repr)
def test_what_was_fitted_keeps_the_law(method: Any) -> None:
    assert check(fitted(method, tiny_model("llama")), only=("survives_saving",)).ok


def test_the_run_goes_on_where_it_was(model: Any, tmp_path: Path) -> None:
    """Trained, saved, loaded, trained: as without a break."""
    twin = copy.deepcopy(model)
    with trained(model, GatedHeads(), 4) as run:
        wanted = logits(run)
    with trained(twin, GatedHeads(), 2):
        twin.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.close()
    with trained(loaded.model, GatedHeads(), 2) as run:
        assert torch.equal(logits(run), wanted)
        assert type(run.model) is type(model)


def test_loading_again_and_again_leaves_one_class(model: Any, tmp_path: Path) -> None:
    """transformers holds on to the classes that it makes models of."""
    saved(tmp_path)
    before = len(type(model).__subclasses__())
    for _ in range(3):
        load(tmp_path).close()
    assert len(type(model).__subclasses__()) <= before + 1


def test_what_is_loaded_is_saved_again_with_what_joined_it(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    run = load(tmp_path / "one")
    run.close()
    with attach(run.model, GatedHeads() | SinkRate()) as joined:
        wanted = logits(joined)
        run.model.save_pretrained(tmp_path / "two")
    assert run.stack == as_stack(GatedHeads())
    with load(tmp_path / "two") as again:
        assert again.stack == joined.stack
        assert torch.equal(logits(again), wanted)
    again.model.save_pretrained(tmp_path / "three")  # closed: what it carries and says is the model's own by now
    with load(tmp_path / "three") as third:
        assert torch.equal(logits(third), wanted)


def test_settings_of_the_call_reach_run_and_model(tmp_path: Path) -> None:
    saved(tmp_path)
    with load(tmp_path, backend="tiled", roles={"image": ((0, 2),)}, dtype=torch.bfloat16) as run:
        assert (run.backend, run.roles) == ("tiled", {"image": ((0, 2),)})
        assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
        logits(run)


def test_a_part_of_a_model_and_many_files(tmp_path: Path) -> None:
    model = models.tiny("bart").eval()
    only = [f"model.decoder.layers.{i}.self_attn" for i in range(2)]
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    with attach(model, Gate(), only=only) as run, torch.no_grad():
        for i, parameter in enumerate(run.parameters()):
            parameter += i + 1
        wanted = run(**inputs).logits
        model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with load(tmp_path) as again, torch.no_grad():
        assert torch.equal(again(**inputs).logits, wanted)
        assert again.layer_names == tuple(only)


@pytest.mark.parametrize("stack", [GatedHeads(), "steered"], ids=str)
def test_a_hub_keeps_it_as_a_folder_does(stack: Any, tmp_path: Path) -> None:
    copied = tmp_path / "models--some--body"  # as the hub's cache lays it out
    wanted = saved(copied / "snapshots" / "0", steering() if stack == "steered" else stack)
    (copied / "refs").mkdir()
    (copied / "refs" / "main").write_text("0")
    with load("some/body", cache_dir=tmp_path, trust_remote_code=False) as run:
        assert torch.equal(logits(run), wanted)
    with pytest.raises(ModelError, match="'some/body' is no file, no folder"):
        load("some/body")


def test_a_class_of_ones_own_is_named(model: Any, tmp_path: Path) -> None:
    class Mine(LlamaForCausalLM):
        pass

    model.__class__ = Mine
    with trained(model, Gate()) as run:
        model.save_pretrained(tmp_path)
        wanted = logits(run)
    with pytest.raises(ModelError, match=r"no class 'Mine' for a LlamaConfig; give the model's own"):
        load(tmp_path)
    with load(tmp_path, kind=Mine) as again:
        assert type(again.model) is Mine
        assert torch.equal(logits(again), wanted)


def test_saving_is_the_models_own_before_and_after(model: Any, tmp_path: Path) -> None:
    calls: list[str] = []

    def own(folder: Any, **more: Any) -> None:
        calls.append(type(model).save_pretrained(model, folder, **more) or "own")

    model.save_pretrained = own
    with attach(model, Scale()) as run:
        model.save_pretrained(tmp_path)
        with run.paused():
            assert model.save_pretrained is own
    assert model.save_pretrained is own
    assert calls == ["own"]
    assert not hasattr(model.config, "heedful")
    assert load(tmp_path).stack == as_stack(Scale())


def test_a_paused_run_saves_nothing_that_it_learned_without_its_stack(model: Any, tmp_path: Path) -> None:
    before = type(model).save_pretrained
    with attach(model, GatedHeads()) as run:
        with run.paused(), pytest.raises(FieldError, match="resume first, or close to save neither"):
            model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(model)
    assert type(model).save_pretrained is before
    assert all(torch.equal(x, run.state_dict()[name]) for name, x in load(tmp_path).state_dict().items())
    run = attach(model, GatedHeads())
    run.pause()
    run.close()
    assert "save_pretrained" not in vars(model)


def test_wrapped_models_save_what_is_theirs(model: Any, tmp_path: Path) -> None:
    wrapped = DataParallel(model)
    with attach(wrapped, GatedHeads()) as run:
        with torch.no_grad():
            for parameter in run.parameters():
                parameter.fill_(0.25)
        wrapped.module.save_pretrained(tmp_path)
        wanted = run.state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in load(tmp_path).state_dict().items())


class Whatever(Scale):
    """Scales by what it is given."""

    by: Any = 1.0


@pytest.mark.parametrize(
    "what",
    [
        heedful.edit(heedful.Site.PATTERN, lambda weights, call: weights * 0.5),
        Whatever(torch.ones(())),
    ],
    ids=repr,
)
def test_what_no_file_can_hold_is_refused_before_anything_is_written(model: Any, what: Any, tmp_path: Path) -> None:
    with attach(model, what), pytest.raises(FieldError, match="cannot be written down: files hold finite numbers"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_behind_on_the_way_to_a_hub(model: Any, tmp_path: Path) -> None:
    with attach(model, steering()), pytest.raises(FieldError, match=r"would leave heedful\.safetensors behind"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_one_plain_error(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with attach(model, steering()), pytest.raises(WriteError, match="cannot write to"):
        model.save_pretrained(tmp_path / "file")


def test_the_tensors_of_another_stack_are_taken_away(model: Any, tmp_path: Path) -> None:
    for what, there in ((steering(), True), (TempScale(0.5), False)):
        with attach(model, what):
            model.save_pretrained(tmp_path)
        assert (tmp_path / TENSORS).exists() == there
        assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("stack", "line"),
    [(GatedHeads(), "heedful_GatedHeads_0_weight"), (SigmoidAttention(), "heedful.load brings back the stack")],
)
def test_transformers_alone_says_what_is_missing(
    stack: Any, line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, stack)
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert any(line in row and "UNEXPECTED" in row for row in caplog.text.splitlines())
    caplog.clear()
    load(tmp_path)
    assert "UNEXPECTED" not in caplog.text


def test_a_model_without_its_stack_is_adopted_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "gates")
    plain = models.load(tmp_path / "gates").model
    assert "was saved with GatedHeads, and this is the model without it" in caplog.text
    for what in (GatedHeads(), GatedHeads() | SinkRate()):
        with pytest.raises(FieldError, match="4 parameters that it had learned are not in the model"):
            attach(plain, what)
    others = (SinkRate(), GatedHeads(0.25), GatedHeads().on(layers=0), SinkRate() | GatedHeads())
    halved = heedful.edit(heedful.Site.PATTERN, lambda weights, call: weights / 2)
    for what in (*others, halved):
        with pytest.raises(FieldError, match="was saved with GatedHeads attached and is another model without it"):
            attach(plain, what)
    assert not any("heedful" in name for name, _ in plain.named_parameters())
    del plain.config.heedful
    with attach(plain, SinkRate()) as run:
        logits(run)

    wanted = saved(tmp_path / "sigmoid", SigmoidAttention())
    plain = models.load(tmp_path / "sigmoid").model
    with attach(plain, SigmoidAttention()) as run:
        assert torch.equal(logits(run), wanted)
    with pytest.raises(FieldError, match=r"with only=\('model.layers',\)"):
        attach(plain, SigmoidAttention(), only="model.layers")


def test_a_folder_without_a_stack_is_told(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="was saved without a stack; load it with"):
        load(tmp_path)
    with pytest.raises(ModelError, match="no such file or folder"):
        load(tmp_path / "nowhere")


def test_a_class_of_ones_own_is_found_where_it_is_imported(tmp_path: Path) -> None:
    saved(tmp_path, Gate())
    assert '"tests.samples.Gate"' in (tmp_path / "config.json").read_text()
    assert load(tmp_path).stack == as_stack(Gate())
    with pytest.raises(CatalogueError, match="no method named 'Gate'"):
        catalogue.named("Gate")


def test_learned_parameters_of_another_shape_are_not_spread(model: Any) -> None:
    with attach(model, Gate()) as run:
        state = {name: x[:1] for name, x in run.state_dict().items()}
        with pytest.raises(FieldError, match=r"0.0.gate = \(1,\): has another shape in this model"):
            run.load_state_dict(state)


def test_an_empty_stack_is_nothing_to_save(model: Any, tmp_path: Path) -> None:
    with attach(model, Stack()):
        model.save_pretrained(tmp_path)
    assert "heedful" not in (tmp_path / "config.json").read_text()


def test_names_that_a_model_turns_over_are_not_left_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers saves some models, ViT among them, under names that it makes by patterns."""
    model = models.tiny("vit")
    with attach(model, TempScale(0.5)):
        model.save_pretrained(tmp_path)
    assert MARK in load_file(tmp_path / "model.safetensors")
    load(tmp_path).close()
    assert "UNEXPECTED" not in caplog.text
