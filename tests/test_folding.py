"""fold(): edits in the weights of a plain model, or the reason why not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from heedful import Method, Site, attach, check, fold, models, operate
from heedful.authoring import Call, Fitted, Layer, Surgery, at
from heedful.conformance import fold_laws
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, FoldError, HeedfulError, RefusedModel, SiteError
from heedful.core.kinds.weights import HeadWeights
from heedful.methods.compress.prune.prune_heads import PruneHeads
from heedful.methods.compress.quantise.absmax import Absmax
from heedful.methods.compress.quantise.quant_vla import QuantVLA
from heedful.methods.intervene.language.act import ACT
from heedful.methods.intervene.language.head_scale import HeadScale
from heedful.methods.intervene.language.temp_scale import TempScale
from tests.samples import PAPER


class Times(Method):
    """Heads times a factor of their own."""

    paper = PAPER
    by: float = 1.5

    def _factor(self, heads: int) -> Tensor:
        return self.by + torch.arange(heads) / heads

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * self._factor(call.heads)[:, None, None]

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return replace(weights, o=weights.o * self._factor(layer.heads)[:, None])


class Plus(Method):
    """A number on top of every entry of a head."""

    paper = PAPER
    by: float = 0.7

    def _added(self, heads: int, width: int) -> Tensor:
        return self.by * torch.linspace(-1, 2, heads * width).view(heads, width)

    @at(Site.HEAD_OUTPUT)
    def add(self, heads: Tensor, call: Call) -> Tensor:
        return heads + self._added(call.heads, heads.shape[-1])[:, None]

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        added = torch.einsum("ehd,hd->e", weights.o, self._added(layer.heads, layer.value_dim))
        return replace(weights, o_bias=added if weights.o_bias is None else weights.o_bias + added)


class After(Method):
    """The attention block's output, half as large."""

    paper = PAPER

    @at(Site.OUTPUT)
    def halve(self, output: Tensor, call: Call) -> Tensor:
        return output / 2

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return replace(weights, o=weights.o / 2, o_bias=None if weights.o_bias is None else weights.o_bias / 2)


class Values(Method):
    """Values twice as large, by the projection."""

    paper = PAPER

    @at(Site.VALUE)
    def twice(self, values: Tensor, call: Call) -> Tensor:
        return 2 * values

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return replace(weights, v=2 * weights.v, v_bias=None if weights.v_bias is None else 2 * weights.v_bias)


class Never(Times):
    """Finds in no model what it would need."""

    paper = PAPER

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights | None:
        return None


class Double(Surgery):
    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return replace(weights, o=2 * weights.o)


def _out(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return next(x for x in found.values() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim)


def _attached(model: Any, what: Any, inputs: dict[str, Tensor]) -> Tensor:
    with attach(model, what) as run:
        return _out(run, inputs)


KINDS = ["llama", "mha", "gpt2", "odd_head_dim", "bert", "mistral", "bart", "vit", "clip", "whisper", "llava"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_goes_into_the_queries_projection(kind: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    found = _out(fold(model, TempScale(0.5)), inputs)
    assert close_model(found, _attached(model, TempScale(0.5), inputs))
    assert not close_model(found, _out(model, inputs))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "qwen3",
            r"TempScale\(tau=0.5\) at SCORES cannot go into .* of model.layers.0.self_attn: q_norm acts",
        ),
        ("gemma2", "attn_logit_softcapping = 5.0 bends"),
        ("t5", "relative_attention_bias acts on queries, keys or scores"),
        ("gpt_oss", "sinks acts on queries, keys or scores"),
    ],
)
def test_a_factor_on_scores_that_is_none_on_queries_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(FoldError, match=reason):
        fold(models.tiny(kind), TempScale(0.5))


def test_reasons_that_no_tiny_model_has() -> None:
    model = models.tiny("t5")
    with pytest.raises(FoldError, match="a position bias is added to the scores"):
        fold(model, TempScale(0.5).on(layers=1))  # this layer takes the first one's bias
    model = models.tiny("llama")
    model.config.clip_qkv = 6.0
    with pytest.raises(FoldError, match=r"clip_qkv = 6.0 bends"):
        fold(model, TempScale(0.5))
    model = models.tiny("llama")
    model.config.final_logit_softcapping = 30.0  # of the vocabulary's logits, no business of attention
    fold(model, TempScale(0.5))
    model.model.layers[0].self_attn.sub_norm = nn.LayerNorm(32)
    with pytest.raises(FoldError, match=r"at HEAD_OUTPUT .*: sub_norm stands between the two"):
        fold(model, Times())
    fold(model, After())
    model = models.tiny("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(FoldError, match="the weight of its q projection serves in another place too"):
        fold(model, TempScale(0.5))
    model = models.tiny("llama")
    model.model.layers[0].self_attn.o_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), False)
    with pytest.raises(FoldError, match=r"its o projection is quantised \(torch.int8\)"):
        fold(model, TempScale(0.5))


def test_a_linear_map_with_more_to_it_is_refused() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    model = models.tiny("llama")
    model.model.layers[0].self_attn.q_proj = Adapted(32, 32, bias=False)
    with pytest.raises(FoldError, match=r"its q projection is a Adapted of .*, which is more than a linear map"):
        fold(model, TempScale(0.5))


STACKS = [
    Plus() | Times(),
    Times() | Plus(),
    Plus() | Times() | After() | Plus(0.2),
    TempScale(0.5) | Values() | Plus(),
    Plus().on(heads=[1, 3]) | Times().on(heads=[0, 1], layers=1) | TempScale(0.4).on(heads=2),
]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_a_stack_goes_in_as_it_acts(stack: Any, kind: str, tmp_path: Path) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    plain = fold(model, stack)
    found = _out(plain, inputs)
    assert close_model(found, _attached(model, stack, inputs))
    assert not close_model(found, _out(model, inputs))
    plain.save_pretrained(tmp_path)
    assert torch.equal(_out(type(model).from_pretrained(tmp_path), inputs), found)


class Keys(Surgery):
    """Keys that are turned round, each head's by a factor of its own."""

    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return replace(weights, k=weights.k * -torch.arange(1, 1 + layer.kv_heads)[:, None, None])


def test_one_map_for_queries_keys_and_values_that_groups_share() -> None:
    """Phi-3's: fewer keys than queries, and no bias."""
    settings = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=97, pad_token_id=0)
    torch.manual_seed(0)
    config = Phi3Config(**settings, num_attention_heads=4, num_key_value_heads=2)
    model = Phi3ForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    stack = TempScale(0.5) | Values() | Times().on(heads=[0, 3])
    assert close_model(_out(fold(model, stack), inputs), _attached(model, stack, inputs))
    layer, turned = (x.model.layers[1].self_attn.qkv_proj.weight for x in (model, operate(model, Keys())))
    factor = torch.tensor([1.0] * 32 + [-1.0] * 8 + [-2.0] * 8 + [1.0] * 16)
    assert torch.equal(turned, layer * factor[:, None])
    with pytest.raises(RefusedModel, match="Phi3Attention maps to queries, keys and values at once"):
        operate(model, PruneHeads(groups=((0, 0), (1, 1))))


def test_heads_need_no_word_of_what_only_the_map_depends_on() -> None:
    for kind in ("qwen3", "gemma2", "t5", "gpt_oss"):
        model = models.tiny(kind)
        inputs = models.tiny_inputs(model)
        assert close_model(_out(fold(model, Times()), inputs), _attached(model, Times(), inputs))


def test_queries_need_no_word_of_what_meets_the_scores_alone() -> None:
    for kind in ("gemma2", "t5", "gpt_oss"):
        model = models.tiny(kind)
        inputs = models.tiny_inputs(model)
        found = _out(fold(model, HeadScale(1.4)), inputs)
        assert close_model(found, _attached(model, HeadScale(1.4), inputs))
        assert not close_model(found, _out(model, inputs))
    with pytest.raises(FoldError, match=r"HeadScale.* at QUERY .*: q_norm acts on queries"):
        fold(models.tiny("qwen3"), HeadScale(1.4))


def test_what_comes_later_in_the_call_acts_on_the_new_weights() -> None:
    model = models.tiny("mha")
    inputs = models.tiny_inputs(model)
    # once two heads are gone, Times knows the two that stay
    pruned = operate(model, PruneHeads(groups=((0, 0), (0, 2), (1, 1), (1, 3))))
    wanted = _attached(pruned, Times(), inputs)
    assert close_model(_out(fold(model, PruneHeads(groups=((0, 0), (0, 2), (1, 1), (1, 3))), Times()), inputs), wanted)
    assert close_model(_out(fold(model, Double(), Double()), inputs), _out(fold(model, _Four()), inputs))


class _Four(Surgery):
    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return replace(weights, o=4 * weights.o)


def test_the_model_it_was_given_stays() -> None:
    model = models.tiny("llama")
    before = copy.deepcopy(model.state_dict())
    plain = fold(model, TempScale(0.5), PruneHeads(groups=((0, 0), (1, 1))))
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert plain.config.num_attention_heads == 2
    assert model.config.num_attention_heads == 4


def test_only_one_part_of_a_model() -> None:
    model = models.tiny("bart")
    plain = fold(model, Times(), only="model.decoder")
    same = {n: torch.equal(a, b) for (n, a), b in zip(model.named_parameters(), plain.parameters(), strict=True)}
    changed = [name for name, equal in same.items() if not equal]
    assert len(changed) == 4  # two layers, each with attention to itself and to the encoder
    assert all("decoder" in name and name.endswith("out_proj.weight") for name in changed)


class Packed(nn.Module):
    """As torch's own quantised maps are."""

    def weight(self) -> Tensor:
        return torch.zeros(32, 64)


def test_errors() -> None:
    model = models.tiny("llama")
    with pytest.raises(FoldError, match=r"ACT\(.*\) acts at PATTERN in a way that no weights can do; attach\(\) it"):
        fold(model, TempScale(0.5) | ACT())
    with pytest.raises(FoldError, match=r"Never\(by=1.5\) at HEAD_OUTPUT cannot go into the weights of model.layers.0"):
        fold(model, Never())
    with pytest.raises(FoldError, match="weights serve every phase, not decode alone"):
        fold(model, TempScale(0.5).when("decode"))
    with pytest.raises(FoldError, match=r"Plus\(by=0.7\) at HEAD_OUTPUT .*: model.layers.0.self_attn.o_proj, a Linear"):
        fold(models.tiny("mistral"), Plus())
    with pytest.raises(FoldError, match=r"changes the projections of keys or values, which heads may share"):
        fold(model, Values().on(heads=[0, 1]))
    with pytest.raises(FieldError, match="layers = 2: must be below 2"):
        fold(model, TempScale(0.5).on(layers=2))
    with pytest.raises(FieldError, match="heads = 4: must be below 4"):
        fold(model, TempScale(0.5).on(heads=4))
    with pytest.raises(FieldError, match=r"fold\(\).what = .*: must be methods, stacks or surgery"):
        fold(model, TempScale)  # type: ignore[arg-type]
    with attach(model, Times()), pytest.raises(FieldError, match=r"fold\(\).model = .*a run is attached to it"):
        fold(model, TempScale(0.5))
    crossed = models.tiny("gpt2", add_cross_attention=True)  # its second kind of layer makes no queries there
    for what, error in ((TempScale(0.5), FoldError), (Double(), RefusedModel)):
        with pytest.raises(error, match="has no separate query, key, value projection"):
            fold(crossed, what)
    packed = copy.deepcopy(model)
    packed.model.layers[0].self_attn.k_proj = Packed()
    with pytest.raises(FoldError, match=r"k_proj \(tests.test_folding.Packed\) packs its weight, which cannot"):
        fold(packed, TempScale(0.5))


def test_weights_must_be_weights() -> None:
    class Wrong(Times):
        paper = PAPER

        def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
            return weights.o  # type: ignore[return-value]

    with pytest.raises(SiteError, match=r"Wrong\(by=1.5\): folds must return HeadWeights, not Tensor"):
        fold(models.tiny("llama"), Wrong())


def test_neutral_settings_change_no_bit() -> None:
    model = models.tiny("llama")
    for (name, a), b in zip(model.named_parameters(), fold(model, TempScale.neutral()).parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_law_looks_for_traces_and_at_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(model: nn.Module, part: Any) -> nn.Module:
        new = fold(model, part)
        new.heedful_was_here = True
        return new

    def unsaved(model: nn.Module, part: Any) -> nn.Module:
        new = fold(model, part)
        new.save_pretrained = model.save_pretrained
        return new

    def refuses(model: nn.Module, part: Any) -> nn.Module:
        raise FoldError("nothing goes")

    for broken, outcome, reason in (
        (fold, "kept", ""),
        (marked, "broken", "something of heedful stays in the model"),
        (unsaved, "broken", "saved and loaded again, it answers differently"),
        (refuses, "does not apply", "nothing goes"),
    ):
        monkeypatch.setattr(fold_laws, "fold", broken)
        verdict = check(Times(), only=("folds_are_equal",))["folds_are_equal"]
        assert (verdict.outcome, reason in verdict.reason) == (outcome, True), verdict


def test_the_error_is_one_of_heedfuls() -> None:
    assert issubclass(FoldError, HeedfulError)


def test_a_model_without_the_stack_it_was_saved_with_is_not_edited(tmp_path: Path) -> None:
    model = models.tiny("llama")
    with attach(model, TempScale(0.5)):
        model.save_pretrained(tmp_path)
    plain = models.load(tmp_path).model
    for verb in (lambda: fold(plain, TempScale(0.5)), lambda: operate(plain, PruneHeads(groups=((0, 0),)))):
        with pytest.raises(
            RefusedModel, match=r"was saved with TempScale attached, and (fold|operate)\(\) edits the we"
        ):
            verb()
    del plain.config.heedful
    fold(plain, TempScale(0.5)).save_pretrained(tmp_path)
    assert "heedful" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("surgery", "field"),
    [
        (Absmax(4, layers=(0, 2)), r"Absmax\.layers = \(0, 2\)"),
        (PruneHeads(groups=((0, 1), (2, 0))), r"PruneHeads\.groups = \(\(0, 1\), \(2, 0\)\)"),
        (
            PruneHeads(0.5, importance=Fitted({str(i): torch.arange(2.0) for i in range(3)})),
            r"PruneHeads\.importance = ",
        ),
        (QuantVLA(Absmax(layers=(2,)), scales=Fitted({str(i): torch.ones(5) for i in range(3)})), r"Absmax\.layers = "),
    ],
)
def test_layers_that_a_model_lacks_are_refused(surgery: Any, field: str) -> None:
    """Nothing that was asked for is left out in silence."""
    with pytest.raises(FieldError, match=field + ".*: .*2 layers; for example"):
        operate(models.tiny("llama"), surgery)
