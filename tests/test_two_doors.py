"""Models with some attention in transformers' interface and some beside it: one run, one numbering, one stack."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, FoldError, NotEntered, RefusedModel
from heedful.core.sites import Site
from heedful.methods import KNorm, SinkRate, TempScale

from .interrupting import interrupted
from .samples import Gate, Keep, Scale, Zero
from .test_torch_modules import Halve

pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing with Through")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 64}
IDS = torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
HEAD = "vision_model.head.attention"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def siglip(attention: str = "eager") -> Any:
    """Its image's tokens are pooled by torch's own nn.MultiheadAttention."""
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model = transformers.SiglipModel(config).eval()
    model.set_attn_implementation(attention)
    return model


def both_of(model: Any) -> tuple[Tensor, Tensor]:
    out = model(input_ids=IDS, pixel_values=PICTURES)
    return out.text_embeds, out.image_embeds


def gemma() -> Any:
    """A language model that is shown what a tower of SigLIP sees; the pooling there runs, and nobody looks at it."""
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    text |= {"layer_types": ["full_attention"] * 2}
    numbers = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, **numbers)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def shown() -> dict[str, Tensor]:
    """A text with a picture in it."""
    ids = IDS.clone()
    ids[:, 1:5] = 60
    return {"input_ids": ids, "pixel_values": PICTURES, "token_type_ids": (ids == 60).long()}


def git() -> Any:
    """Its texts are read by attention that is written out, its pictures through the interface."""
    config = transformers.GitConfig(vision_config=VISION, **TEXT)
    return transformers.GitForCausalLM(config).eval()


class OwnAttention(nn.Module):
    """Attention beside the interface, in one of several ways."""

    def __init__(self, how: str = "written") -> None:
        super().__init__()
        self.how, self.num_heads = how, 2

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        if self.how == "kernel":
            out = F.scaled_dot_product_attention(heads, heads, heads)
        else:
            weights = (heads @ heads.mT / heads.shape[-1] ** 0.5).softmax(-1)
            out = (weights.square() if self.how == "squared" else weights) @ heads
        return out.transpose(1, 2).flatten(2)


class Beside(nn.Module):
    """A feed-forward part with attention before it."""

    def __init__(self, mlp: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.mlp, self.attention = mlp, attention

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(x))


def llama(*attentions: nn.Module | None) -> Any:
    """A decoder whose layers have attention of their own beside that of the interface."""
    model = models.tiny("llama").eval()
    for layer, attention in zip(model.model.layers, attentions, strict=False):
        if attention is not None:
            layer.mlp = Beside(layer.mlp, attention)
    return model


def test_layers_are_numbered_in_the_order_of_modules_whichever_door_they_have() -> None:
    with attach(siglip(), Look()) as run:
        assert run.layer_names == (
            *(f"text_model.encoder.layers.{i}.self_attn" for i in (0, 1)),
            *(f"vision_model.encoder.layers.{i}.self_attn" for i in (0, 1)),
            HEAD,
        )
    model = llama(OwnAttention(), OwnAttention("kernel"))
    with attach(model, Look()) as run:
        assert [name.removeprefix("model.layers.") for name in run.layer_names] == [
            "0.self_attn", "0.mlp.attention", "1.self_attn", "1.mlp.attention",
        ]  # fmt: skip
        run(input_ids=IDS)
        assert run.activity().entered == (0, 1, 2, 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_what_changes_nothing_is_bit_for_bit_and_what_acts_nowhere_too(attention: str) -> None:
    model = siglip(attention)
    plain = both_of(model)
    with attach(model, Through(), backend="reference"):
        through = both_of(model)
    with attach(model, Look().when("decode")) as run:
        idle = both_of(model)
        assert set(run.activity().entered) == set(range(5))
    again = both_of(model)
    for a, b, c, d in zip(plain, through, idle, again, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(a, d)
        assert close_model(b, a)  # torch's function scales queries, and the engine scores
    assert torch.equal(plain[0], through[0]) or attention == "sdpa"


@torch.no_grad()
def test_the_head_is_read_and_edited_as_written_out() -> None:
    model = siglip()
    head, tokens = model.vision_model.head, model.vision_model(pixel_values=PICTURES).last_hidden_state
    probe = head.probe.repeat(2, 1, 1)
    _, wanted = head.attention(probe, tokens, tokens, average_attn_weights=False)
    with attach(model, Keep().on(layers=4)) as run:
        both_of(model)
        (found,) = run[0][4].value
    assert close(found, wanted)
    texts, pictures = both_of(model)
    with attach(model, Zero().on(layers=4)):
        same, zeroed = both_of(model)
    assert torch.equal(texts, same)
    head.attention.in_proj_weight.data[64:] = 0  # no values, as if nothing were looked at
    head.attention.in_proj_bias.data[64:] = 0
    assert close_model(zeroed, both_of(model)[1])
    assert not close_model(zeroed, pictures)


@torch.no_grad()
def test_one_method_acts_in_all_of_them() -> None:
    model, factor = siglip(), 0.5
    with attach(model, TempScale(1 / factor)) as run:
        found = both_of(model)
        assert run.active
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data[:32] *= factor
            module.in_proj_bias.data[:32] *= factor
        elif hasattr(module, "q_proj"):
            module.q_proj.weight.data *= factor
            module.q_proj.bias.data *= factor
    for a, b in zip(found, both_of(model), strict=True):
        assert close_model(a, b)


@torch.no_grad()
def test_what_a_text_does_not_reach_is_looked_at_when_a_picture_does() -> None:
    model = gemma()
    plain, seen = model(input_ids=IDS).logits, model(**shown()).logits
    with attach(model, Look()) as run:
        assert run.layer_names[2] == f"model.vision_tower.{HEAD.partition('.')[2]}"
        assert close_model(run(input_ids=IDS).logits, plain)
        assert run.activity().entered == (3, 4)
        assert close_model(run(**shown()).logits, seen)
        assert run.activity().entered == (0, 1, 2, 3, 4)
        assert close_model(run(input_ids=IDS).logits, plain)
    with attach(model, Halve().on(layers=2)) as run:
        run(**shown())
        assert run.active


@torch.no_grad()
def test_generation_has_a_cache_where_there_is_one() -> None:
    model, how = gemma(), {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**shown(), **how, output_logits=True)
    with attach(model, Look()) as run:
        looked = run.generate(**shown(), **how, output_logits=True)
    assert torch.equal(plain.sequences, looked.sequences)
    for a, b in zip(plain.logits, looked.logits, strict=True):
        assert close_model(a, b)
    with attach(model, KNorm(6)) as run:
        kept = run.generate(**shown(), **how)
        assert run.state.kept[3][0] < run.state.kept[3][1]
        assert set(run.state.kept) == {3, 4}
    assert kept.past_key_values.get_seq_length() > 6


@torch.no_grad()
def test_an_edit_of_a_cache_that_nobody_follows_is_refused_where_it_would_act() -> None:
    model = git()
    run = attach(model, KNorm(4))
    with pytest.raises(RefusedModel, match=r"CACHE edit.*encoder.layer.0.*on\(layers"):
        run(input_ids=IDS, pixel_values=PICTURES)
    run.close()
    run = attach(model, KNorm(4).on(layers=[0, 1]))
    run(input_ids=IDS, pixel_values=PICTURES)
    run.close()


@torch.no_grad()
def test_written_attention_with_a_cache_of_its_own_generates_the_same() -> None:
    model, how = git(), {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(input_ids=IDS, pixel_values=PICTURES, **how)
    with attach(model, Through(), backend="reference") as run:
        assert torch.equal(run.generate(input_ids=IDS, pixel_values=PICTURES, **how), plain)
        assert run.activity().entered == (0, 1, 2, 3)


def test_only_leaves_out_what_it_does_not_name_and_does_not_look_at_it() -> None:
    model = siglip()
    with attach(model, Look(), only="vision_model.encoder") as run:
        assert run.layer_names == tuple(f"vision_model.encoder.layers.{i}.self_attn" for i in (0, 1))
        assert "forward" not in vars(model.get_submodule(HEAD))
        assert not model.get_submodule(HEAD)._forward_hooks
    with attach(model, Halve(), only=HEAD) as run, torch.no_grad():
        assert run.layer_names == (HEAD,)
        both_of(model)
        assert run.active
    with pytest.raises(FieldError, match="no served layer of SiglipModel lies there"):
        attach(model, Look(), only="vision_model.head.mlp")


@torch.no_grad()
def test_what_cannot_be_followed_is_refused_by_name_and_the_rest_served() -> None:
    model = llama(OwnAttention(), OwnAttention("squared"))
    plain = model(input_ids=IDS).logits
    why = r"model.layers.1.mlp.attention \(OwnAttention: a softmax of its own: its weights are changed"
    with pytest.raises(RefusedModel, match=rf"{why}.*only=\['model.layers.0', 'model.layers.1.self_attn'\]"):
        attach(model, Look(), inputs={"input_ids": IDS})
    with attach(model, Look()) as run:
        with pytest.raises(RefusedModel, match=rf"{why}.*only=\['model.layers.0', 'model.layers.1.self_attn'\]"):
            run(input_ids=IDS)
        assert not run.state.statistics
    assert torch.equal(model(input_ids=IDS).logits, plain)
    with attach(model, Look(), only=["model.layers.0", "model.layers.1.self_attn"]) as run:
        run(input_ids=IDS)
        assert run.activity().entered == (0, 1, 2)
    model = llama(OwnAttention("squared"), OwnAttention())
    rest = r"and 1 that did not run yet .*only=\['model.layers.0.self_attn', 'model.layers.1.self_attn'\]"
    with attach(model, Look()) as run, pytest.raises(RefusedModel, match=rest):
        run(input_ids=IDS)
    with attach(model, Look(), only="model.layers.0.mlp") as run, pytest.raises(RefusedModel, match=r"changed a.*\)$"):
        run(input_ids=IDS)


@torch.no_grad()
def test_inputs_show_what_the_layers_beside_the_interface_do() -> None:
    model = siglip()
    with attach(model, Halve(), inputs={"input_ids": IDS, "pixel_values": PICTURES}) as run:
        both_of(model)
        assert run.active
    with pytest.raises(FieldError, match="those that go through transformers' interface are known"):
        attach(model, Halve(), inputs=IDS, only="vision_model.encoder")


class OuterAttention(nn.Module):
    """Speaks of a softmax, and leaves attention to a module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * x.softmax(-1))


class Nameless(OwnAttention):
    """Nothing in its name says what it does."""


@torch.no_grad()
def test_attention_may_be_in_a_module_inside() -> None:
    model = llama(OuterAttention(OwnAttention("kernel")))
    plain = model(input_ids=IDS).logits
    with attach(model, Through(), backend="reference") as run:
        assert close_model(run(input_ids=IDS).logits, plain)
        assert run.layer_names[2] == "model.layers.0.mlp.attention.inner"
        assert 2 in run.activity().entered
        assert 1 not in run.activity().entered
    for inner, said in ((Nameless("kernel"), r": its attention is in .*attention.inner"), (nn.Identity(), "")):
        refused = pytest.raises(RefusedModel, match=rf"\(OuterAttention{said}\). To work on the rest")
        with attach(llama(OuterAttention(inner)), Look()) as run, refused:
            run(input_ids=IDS)


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
