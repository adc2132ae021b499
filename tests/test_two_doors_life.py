"""Runs in models with both doors open: how they end, what they learn and save, what is told of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import heedful
from benchmarks.coverage.probe import Look, Through
from heedful import attach, edit, models
from heedful.adapters.choosing import adapter_for
from heedful.cli.app import app
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, FoldError, NotEntered, RefusedModel
from heedful.core.sites import Site
from heedful.methods import SinkRate, TempScale

from .interrupting import interrupted
from .samples import Gate, Keep, Scale, Zero
from .two_doors import (
    HEAD,
    IDS,
    PICTURES,
    VISION,
    OwnAttention,
    both_of,
    gemma,
    git,
    llama,
    siglip,
)

pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing with Through")


@torch.no_grad()
def test_one_that_changes_its_mind_is_found_out() -> None:
    attention = OwnAttention("kernel")
    model = llama(attention)
    with attach(model, Look()) as run:
        run(input_ids=IDS)
        attention.how = "squared"
        with pytest.raises(NotEntered, match="did not pass through heedful"):
            run(input_ids=IDS)


@pytest.mark.parametrize("looked", [False, True])
@torch.no_grad()
def test_the_model_is_left_as_it_was(looked: bool) -> None:
    model = siglip("sdpa")
    before = fingerprint(model)
    run = attach(model, Scale() | Gate())
    if looked:
        both_of(model)
    with pytest.raises(FieldError, match="a run is attached already"):
        attach(model, Look())
    assert heedful.attached(model) is run
    assert heedful.attached(model.vision_model.head) is run
    run.close()
    assert fingerprint(model) == before


def leaving(frame: FrameType) -> bool:
    """What the adapter and its doors do, and the hooks; what they call has tests of its own."""
    return frame.f_code.co_filename.endswith(("adapter.py", "interface.py", "door.py", "hooked.py"))


def test_an_interrupt_in_close_leaves_nothing_that_closing_again_does_not_take() -> None:
    model = siglip()
    before, at, go_on = fingerprint(model), 0, True
    while go_on:
        run = attach(model, Scale() | Gate())
        if not at:
            both_of(model)
        go_on = interrupted(at, run.close, leaving)
        run.close()
        assert fingerprint(model) == before, at
        at += 11  # each line would take long
    assert at > 100


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(reentrant: bool) -> None:
    model, batch = git().train(), {"input_ids": IDS, "pixel_values": PICTURES, "labels": IDS}
    model.config.hidden_dropout_prob = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with attach(model, Scale()) as run:
            run(**batch, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    model.enable_input_require_grads()
    found = gradients()
    assert len(found) == len(wanted) > 10
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_compiled_parts_are_called_as_they_are_written() -> None:
    model = siglip()
    plain = both_of(model)
    model.vision_model.head.compile(backend="eager")
    with attach(model, Zero()) as run:
        zeroed = both_of(model)
        assert run.activity().entered == (0, 1, 2, 3, 4)
    assert not close_model(zeroed[1], plain[1])
    assert close_model(both_of(model)[1], plain[1])


def test_what_is_learned_is_learned_in_all_of_them_and_saved(tmp_path: Path) -> None:
    model = siglip()
    with attach(model, Gate()) as run:
        for parameter in run.parameters():
            parameter.data += torch.rand_like(parameter)
        assert len({layer for _, layer in run.state.params}) == 5
        wanted = both_of(model)
        model.save_pretrained(tmp_path)
    again = heedful.load(tmp_path, attn_implementation="eager")
    with again, torch.no_grad():
        for a, b in zip(both_of(again.model), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_mask_of_yes_and_no_is_what_the_implementation_makes_of_it(attention: str) -> None:
    """transformers' eager attention adds it, as 0 and 1."""
    model, mask = models.tiny("bert").eval(), torch.ones(2, 1, 10, 10, dtype=torch.bool).tril(2)
    model.set_attn_implementation(attention)
    given = {"input_ids": IDS, "attention_mask": mask}
    plain = model(**given).logits
    with attach(model, Through(), backend="reference") as run:
        found = run(**given).logits
    assert torch.equal(found, plain) if attention == "eager" else close_model(found, plain)
    with attach(model, Keep()) as run:
        run(**given)
        seen = run[0][0].value[0][:, :, 0, -1] > 0
    assert bool(seen.all()) == (attention == "eager")


def test_weights_are_read_and_folded_in_the_interface_alone() -> None:
    model = siglip()
    with pytest.raises(FoldError, match=rf"weights of {HEAD}: .*computes attention by itself"):
        heedful.fold(model, TempScale(0.5))
    folded = heedful.fold(model, TempScale(0.5), only=["text_model", "vision_model.encoder"])
    with attach(model, TempScale(0.5).on(layers=range(4))), torch.no_grad():
        assert all(close_model(a, b) for a, b in zip(both_of(folded), both_of(model), strict=True))


@torch.no_grad()
def test_outputs_are_edited_where_there_are_projections() -> None:
    model, method = llama(OwnAttention(), None), edit(Site.OUTPUT, lambda x, call: x * 2)
    run = attach(model, method)
    for _ in range(2):
        with pytest.raises(RefusedModel, match=r"OUTPUT or BLOCK edit cannot act in model.layers.0.mlp"):
            run(input_ids=IDS)
    run.close()
    with attach(model, method.on(layers=[0, 2])) as run:
        run(input_ids=IDS)
        assert run.active
    model = siglip()
    pictures = both_of(model)[1]
    with attach(model, method.on(layers=4)):
        doubled = both_of(model)[1]
    assert not close_model(doubled, pictures)
    for x in (model.get_submodule(HEAD).out_proj.weight, model.get_submodule(HEAD).out_proj.bias):
        x *= 2
    assert close_model(doubled, both_of(model)[1])


@torch.no_grad()
def test_the_stream_is_read_where_there_are_lists_of_layers() -> None:
    model, method = siglip(), edit(Site.RESIDUAL, lambda x, call: x * 2)
    with pytest.raises(RefusedModel, match=f"no RESIDUAL edit can act in {HEAD}: it stands in no list"):
        attach(model, method.on(layers=4))
    with attach(model, method) as run:
        found = both_of(model)
        assert run.active
    with attach(model, method.on(layers=range(4))):
        assert all(map(torch.equal, both_of(model), found))


def test_doctor_tells_what_it_has_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda name: SimpleNamespace(model=siglip(), name=name))
    told = " ".join(CliRunner().invoke(app, ["doctor", "siglip"], catch_exceptions=False).stdout.split())
    assert "served: 5 attention layers of SiglipModel" in told
    assert f"not looked at yet: {HEAD} computes attention by itself" in told
    assert "4 query heads, 4 key heads, 8 wide" in told
    assert f"no surgery: {HEAD} (MultiheadAttention)" in told


@torch.no_grad()
def test_all_are_counted_before_anything_ran() -> None:
    assert len(adapter_for(gemma()).layer_names) == 5
    model = git()
    with attach(model, SinkRate()) as run:
        run(input_ids=IDS, pixel_values=PICTURES)
        assert {layer for _, _, layer in run.state.statistics} == {0, 1, 2, 3}


def test_pictures_are_diagnosed_by_a_model_whose_pooling_stands_beside() -> None:
    config = transformers.SiglipVisionConfig(**VISION)
    told = str(heedful.diagnose(transformers.SiglipVisionModel(config).eval(), PICTURES))
    assert "3 layers of 4 heads" in told


@torch.no_grad()
def test_a_config_may_ask_for_patterns_of_every_forward() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with attach(model, Through()):
        given = model(input_ids=IDS).attentions
        model.config.output_attentions = False
        assert model(input_ids=IDS).attentions is None
    assert [x.shape for x in given] == [(2, 4, 10, 10)] * 2
