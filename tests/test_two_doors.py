"""Models with some attention in transformers' interface and some beside it: one run, one numbering, one stack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage.probe import Look, Through
from heedful import Site, attach, edit
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, RefusedModel
from heedful.methods import KNorm, TempScale

from .samples import Keep, Zero
from .test_torch_modules import Halve
from .two_doors import (
    HEAD,
    IDS,
    PICTURES,
    OwnAttention,
    both_of,
    gemma,
    git,
    llama,
    shown,
    siglip,
)

pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing with Through")


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


class Nameless(nn.Module):
    """Nothing in its name says what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


@torch.no_grad()
def test_attention_may_be_in_a_module_inside() -> None:
    model = llama(OuterAttention(OwnAttention("kernel")))
    plain = model(input_ids=IDS).logits
    with attach(model, Through(), backend="reference") as run:
        assert close_model(run(input_ids=IDS).logits, plain)
        assert run.layer_names[2] == "model.layers.0.mlp.attention.inner"
        assert 2 in run.activity().entered
        assert 1 not in run.activity().entered
    calls: list[int] = []
    with attach(model, edit(Site.HIDDEN, lambda x, call: (calls.append(call.layer), 2 * x)[1])) as run:
        run(input_ids=IDS)
    assert calls == [0, 2, 3], "a look is no call, and what stands around a layer is none"
    for inner, said in ((Nameless(), r": its attention is in .*attention.inner"), (nn.Identity(), "")):
        refused = pytest.raises(RefusedModel, match=rf"\(OuterAttention{said}\). To work on the rest")
        with attach(llama(OuterAttention(inner)), Look()) as run, refused:
            run(input_ids=IDS)
