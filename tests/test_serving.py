"""What a model may be besides a plain one: biases yet to be learned, wrapped, fused, 2-D, offloaded."""

from __future__ import annotations

import copy
from dataclasses import astuple
from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, SwinConfig, SwinModel

from benchmarks.coverage import tiny as zoo
from heedful import attach, diagnose, fit, fold, models, operate
from heedful.adapters.choosing import adapter_for
from heedful.adapters.weights import read_vocabulary
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError, HeedfulError, RefusedModel
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.explaining import logit_lens
from heedful.facts import facts_of
from heedful.methods.compress.prune.prune_heads import PruneHeads
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.methods.intervene.vision.gem import GEM
from heedful.methods.mechanisms.gates.gated_heads import GatedHeads

from .samples import PAPER, Scale

pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


class HalfOutput(Method):
    """Half of what attention adds to the stream."""

    paper = PAPER

    @at(Site.OUTPUT)
    def halve(self, output: Tensor, call: Call) -> Tensor:
        return output / 2


class HalfHidden(Method):
    """Half of what attention sees."""

    paper = PAPER

    @at(Site.HIDDEN)
    def halve(self, hidden: Tensor, call: Call) -> Tensor:
        return hidden / 2


def test_a_bias_that_is_zero_learns() -> None:
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=2)
    model, pixels = SwinModel(config).eval(), torch.randn(2, 3, 16, 16)
    tables = [p for name, p in model.named_parameters() if "relative_position_bias" in name]
    for table in tables:
        table.data.zero_()

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(pixels)[0].square().sum(), tables))

    wanted = gradients()
    with attach(model, Scale(1.0)):
        found = gradients()
    assert tables
    assert all(g.any() for g in wanted)
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))


def offloaded(way: str, folder: Path, kind: str = "llama") -> PreTrainedModel:
    model, cpu = models.tiny(kind), torch.device("cpu")
    if way == "memory":
        return accelerate.cpu_offload(model, cpu)
    if way == "disk":
        return accelerate.disk_offload(model, folder, cpu)
    positions = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    positions["model.layers.1"] = "disk"
    return accelerate.dispatch_model(model, positions, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("way", ["memory", "disk", "one layer on disk"])
def test_weights_that_are_elsewhere_are_attached_to_and_not_edited(way: str, tmp_path: Path) -> None:
    model, whole = offloaded(way, tmp_path), models.tiny("llama")
    ids = models.tiny_inputs(whole)["input_ids"]
    with attach(model, TempScale(0.5)), attach(whole, TempScale(0.5)):
        assert close_model(model(ids).logits, whole(ids).logits)
    found, wanted = (diagnose(m, ids, measures="weibull_weights") for m in (model, whole))
    assert found.facts["weights"] == wanted.facts["weights"]
    assert found.tables().keys() == wanted.tables().keys()
    assert all(found.tables()[name].equals(table) for name, table in wanted.tables().items())
    for mine, its in zip(astuple(read_vocabulary(model)), astuple(read_vocabulary(whole)), strict=True):
        assert torch.equal(mine, its)
    if way == "one layer on disk":  # and the unembedding at hand
        assert str(logit_lens(model, ids[:1])) == str(logit_lens(whole, ids[:1]))
    else:
        with pytest.raises(RefusedModel, match=r"logit_lens\(\) needs all weights .* is offloaded .*; load"):
            logit_lens(model, ids[:1])
    with pytest.raises(RefusedModel, match=r"fold\(\) needs all weights .* is offloaded .*; load the model whole"):
        fold(model, TempScale(0.5))
    with pytest.raises(RefusedModel, match=r"operate\(\) needs all weights .* is offloaded"):
        operate(model, PruneHeads(groups=((0, 0),)))


@pytest.mark.parametrize("way", ["memory", "disk"])
def test_a_table_that_is_tied_is_one_weight_wherever_it_is(way: str, tmp_path: Path) -> None:
    found = facts_of(offloaded(way, tmp_path, "gpt2"), "one", 2)
    assert found == facts_of(models.tiny("gpt2"), "one", 2)


def test_what_scales_a_layer_is_read_where_it_is_elsewhere() -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, layerscale_value=0.5
    )
    whole = Dinov2Model(config).eval()
    away = accelerate.cpu_offload(copy.deepcopy(whole), torch.device("cpu"))
    found, wanted = (fit(GEM(), model, ()).maps for model in (away, whole))
    assert found is not None
    assert wanted is not None
    assert found.digest == wanted.digest


@pytest.mark.parametrize("way", ["memory", "disk"])
def test_gates_need_a_device_to_learn_on(way: str, tmp_path: Path) -> None:
    model = offloaded(way, tmp_path)
    with pytest.raises(RefusedModel, match="has no device to learn on; load the model without offload"):
        attach(model, GatedHeads())
    assert not any("heedful" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "name",
    [
        "ModernBertForMaskedLM", "GPTNeoXForCausalLM", "GPTBigCodeForCausalLM", "DeepseekV3ForCausalLM",
        "DeepseekV4ForCausalLM", "JetMoeForCausalLM",
    ],
)  # fmt: skip
def test_gates_need_sizes_and_no_projections_of_their_own(name: str) -> None:
    one = zoo.build(name)
    seen: dict[int, Call] = {}

    class Look(Method):
        """Every layer's call."""

        paper = PAPER

        @at(Site.HEAD_OUTPUT)
        def look(self, heads: Tensor, call: Call) -> Tensor:
            seen[call.layer] = call
            return heads

    plain = zoo.output_tensors(one.forward())
    with attach(one.model, Look() | GatedHeads()) as run:
        gated = zoo.output_tensors(one.forward())
        weights = {name.split(".")[1]: x for name, x in run.state_dict().items() if name.endswith("weight")}
        for layer, call in seen.items():
            assert call.hidden is not None
            assert weights[str(layer)].shape == (call.heads, call.hidden.shape[-1] // call.heads)
        for size in adapter_for(one.model, None).sizes():
            call = seen[size.number]
            assert call.query is not None
            assert call.value is not None
            assert (size.heads, size.kv_heads) == (call.query.shape[1], call.value.shape[1])
            assert (size.head_dim, size.value_dim) == (call.query.shape[-1], call.value.shape[-1])
    assert not close_model(gated[0], plain[0])


@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "InternVLForConditionalGeneration", "NeoMMEModel"])
def test_output_is_what_the_layer_adds_to_the_stream_whatever_it_is_called(name: str) -> None:
    one = zoo.build(name)
    modules = dict(one.model.named_modules())
    with attach(one.model, HalfOutput()) as run:
        found = zoo.output_tensors(one.forward())
    handles = [
        modules[path].register_forward_hook(lambda _, args, out: (out[0] / 2, *out[1:])) for path in run.layer_names
    ]
    wanted = zoo.output_tensors(one.forward())
    for handle in handles:
        handle.remove()
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))
    assert not close_model(found[0], zoo.output_tensors(one.forward())[0])


class Clipped(nn.Module):
    """A linear map and what is built around it, as Gemma 4's towers have it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).clamp(-1, 1)


def test_output_is_behind_what_is_built_around_the_projection() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    for layer in model.model.layers:
        layer.self_attn.o_proj = Clipped(layer.self_attn.o_proj)
    with attach(model, HalfOutput()) as run:
        found = model(ids).logits
        for path in run.layer_names:
            projection = model.get_submodule(path).o_proj
            projection.forward = lambda x, inner=projection.linear: inner(x).clamp(-1, 1) / 2
    assert close_model(found, model(ids).logits)


@pytest.mark.parametrize("name", ["Qwen2VLForConditionalGeneration", "Glm4vForConditionalGeneration"])
def test_hidden_states_may_stand_in_one_row(name: str) -> None:
    one = zoo.build(name)
    tower = next(n for n in adapter_for(one.model, None).layer_names if "visual" in n).partition(".blocks")[0]
    flat = one.model.get_submodule(f"{tower}.blocks.0.attn")
    seen: list[torch.Size] = []
    with attach(one.model, HalfHidden(), only=tower) as run:
        handle = flat.register_forward_pre_hook(
            lambda _, args, kw: seen.append((*args, *kw.values())[0].shape), with_kwargs=True
        )
        found = zoo.output_tensors(one.forward())
        handle.remove()

    def halve(_: nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> object:
        if args:
            return (args[0] / 2, *args[1:]), given
        return args, {**given, "hidden_states": given["hidden_states"] / 2}

    handles = [
        one.model.get_submodule(path).register_forward_pre_hook(halve, with_kwargs=True) for path in run.layer_names
    ]
    wanted = zoo.output_tensors(one.forward())
    for handle in handles:
        handle.remove()
    assert len(seen[0]) == 2
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))
    assert not close_model(found[0], zoo.output_tensors(one.forward())[0])


class Packed(torch.Tensor):
    """What quantisers keep weights in: looks like its numbers, and computes in its own way."""

    def __deepcopy__(self, memo: object) -> Packed:
        return self


class Packed4Bit(nn.Parameter):
    """What bitsandbytes keeps them in: one byte for two of them."""


def test_quantised_weights_are_attached_to_and_not_edited() -> None:
    model = models.tiny("llama")
    plain = model.model.layers[0].self_attn.v_proj.weight
    packed = torch.zeros(plain.numel() // 2, 1, dtype=torch.uint8)
    for weight in (
        nn.Parameter(plain.detach().as_subclass(Packed)),  # torchao, quanto
        Packed4Bit(packed, requires_grad=False),
        nn.Parameter(plain.detach().to(torch.int8), requires_grad=False),
    ):
        model.model.layers[0].self_attn.v_proj.weight = weight
        for verb in (lambda: operate(model, PruneHeads(groups=((0, 0),))), lambda: fold(model, TempScale(0.5))):
            with pytest.raises(HeedfulError, match=r"the weight of its v projection is quantised \(.*int8|Packed"):
                verb()
        with attach(model, GatedHeads()) as run:
            assert len(run.parameters()) == 4


def test_learned_parameters_that_a_model_carries_are_taken_up_and_stay() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, GatedHeads()) as run:
        for parameter in run.parameters():
            torch.nn.init.normal_(parameter)
        trained, state = model(ids).logits, run.state_dict()
        carried = {name: x for name, x in model.named_parameters() if "heedful_" in name}
    assert not any("heedful_" in name for name, _ in model.named_parameters())
    for name, parameter in carried.items():  # as one who loads a trained checkpoint by hand leaves it
        path, _, key = name.rpartition(".")
        model.get_submodule(path).register_parameter(key, nn.Parameter(parameter.detach().clone()))
    with attach(model, GatedHeads()) as run:
        assert all(torch.equal(x, state[name]) for name, x in run.state_dict().items())
        assert torch.equal(model(ids).logits, trained)
    assert {name for name, _ in model.named_parameters() if "heedful_" in name} == set(carried)
    with pytest.raises(FieldError, match="model carries 4 learned parameters of an earlier run"):
        attach(model, Scale() | GatedHeads())
    with pytest.raises(FieldError, match="carries heedful_GatedHeads_0"):
        attach(model, GatedHeads().on(layers=[0]))
    del model.model.layers[1].self_attn.heedful_GatedHeads_0_bias
    with pytest.raises(FieldError, match="lacks heedful_GatedHeads_0_bias; attach the stack that learned them"):
        attach(model, GatedHeads())
    model.model.layers[1].self_attn.heedful_GatedHeads_0_bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(
        FieldError, match=r"heedful_GatedHeads_0_bias = \(3,\): is what model.layers.1.self_attn carries"
    ):
        attach(model, GatedHeads())
    assert models.tiny("llama").config._attn_implementation == model.config._attn_implementation
