"""Modules around a transformers model: the run works in the model, and calls the module that was given."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, diagnose, fit, fold, load, models, operate
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FoldError, ModelError, RefusedModel
from heedful.methods.compress.prune.prune_heads import PruneHeads
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.methods.mechanisms.gates.gated_heads import GatedHeads

IDS = torch.arange(3, 27).view(2, 12)


class Around(nn.Module):
    """As sentence-transformers has it: the model deep inside, and something of its own done to what it says."""

    def __init__(self, model: nn.Module, beside: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Module())
        self.first[0].auto_model = model
        self.beside = beside

    def forward(self, ids: Tensor) -> Tensor:
        return self.first[0].auto_model(ids).logits.mean(1)


class Adapted(nn.Module):
    """As PEFT has it: the model two attributes down, and its attributes reachable from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)


class LowRank(nn.Module):
    """A projection with an adapter on it, which shows the weight that it adapts."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.low = nn.Linear(linear.in_features, linear.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.low(x)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [Around, Adapted, nn.DataParallel, pytest.param(compiled, marks=pytest.mark.slow)])
def test_the_run_works_inside_and_calls_what_it_was_given(wrap: Any) -> None:
    model = models.tiny("llama")
    wrapper = wrap(model)

    def said(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.logits

    plain = said(wrapper(IDS))
    with attach(model, TempScale(0.3)):
        wanted, tokens = said(wrapper(IDS)), model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert not close_model(wanted, plain)
    with attach(wrapper, TempScale(0.3)) as run:
        assert close_model(said(run(IDS)), wanted)
        assert close_model(said(wrapper(IDS)), wanted)
        assert torch.equal(run.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
        assert run.difference(IDS) > 0
    assert close_model(said(wrapper(IDS)), plain)
    for folded in (fold(wrapper, TempScale(0.3)), fold(model, TempScale(0.3))):
        assert type(folded) is type(model)
        with attach(model, TempScale(0.3)):
            assert close_model(folded(IDS).logits, model(IDS).logits)
    fitted = fit(PruneHeads(0.5), wrapper, [{"input_ids": IDS, "labels": IDS}]) if wrap is not Around else None
    if fitted is not None:
        small = operate(wrapper, fitted)
        assert close_model(small(IDS).logits, operate(model, fitted)(IDS).logits)
    with attach(wrapper, GatedHeads()) as run:
        assert len(run.parameters()) == 4


def test_what_is_diagnosed_is_the_model_inside() -> None:
    model = models.tiny("llama")
    found, wanted = (diagnose(m, IDS[:1]) for m in (Around(model), model))
    assert found.statistics.keys() == wanted.statistics.keys()
    assert all(str(found.statistics[key]) == str(x) for key, x in wanted.statistics.items())


def test_one_model_and_no_attention_beside_it() -> None:
    one, other = models.tiny("llama"), models.tiny("bert")
    with pytest.raises(RefusedModel, match=r"Linear is not a transformers model .* and holds none"):
        diagnose(nn.Linear(2, 2), IDS[:1])
    with pytest.raises(RefusedModel, match=r"Linear calls no attention of torch's"):
        attach(nn.Linear(2, 2), TempScale(0.3), inputs=torch.ones(1, 2))
    with attach(nn.Linear(2, 2), TempScale(0.3)) as run, pytest.raises(RefusedModel, match="calls no attention"):
        run(torch.ones(1, 2))
    both = Around(one, other)
    with pytest.raises(
        RefusedModel, match=r"holds 2 transformers models, first.0.auto_model, beside; attach to one of"
    ):
        attach(both, TempScale(0.3))
    beside = Around(one, nn.MultiheadAttention(8, 2))
    both = r"Attach to one of both, model\.first\.0\.auto_model or model\.beside"
    with pytest.raises(RefusedModel, match=rf"outside the transformers model in it too: beside\. {both}$"):
        attach(beside, TempScale(0.3))
    parallel = nn.DataParallel(one)
    parallel.device_ids = [0, 1]
    with pytest.raises(RefusedModel, match="copies the model to 2 devices in every forward"):
        attach(parallel, TempScale(0.3))


class Pool(nn.Module):
    """Attention that no name tells of."""

    attends = True

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x if self.attends else weights


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = models.tiny("bert").base_model, nn.Sequential(Pool())

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(ids).last_hidden_state)


class Likened(Pooled):
    """Says how alike tokens are, by a softmax of products that it multiplies with nothing."""

    def forward(self, ids: Tensor) -> Tensor:
        out = self.inner(ids).last_hidden_state
        return (out @ out.mT).softmax(-1)


@torch.no_grad()
def test_what_is_around_a_model_is_not_taken_for_what_is_in_it() -> None:
    with attach(Likened().eval(), TempScale(0.3)) as run:
        assert run(IDS).shape == (*IDS.shape, IDS.shape[1])
    says = r"too: 0\.head\.0\. Attach to one of both, model\.0\.inner or model\.0\.head$"
    with attach(nn.Sequential(Pooled()).eval(), TempScale(0.3)) as run, pytest.raises(RefusedModel, match=says):
        run(IDS)


@torch.no_grad()
def test_attention_beside_the_model_that_nothing_tells_of_is_refused_when_it_runs() -> None:
    model = Pooled().eval()
    plain = model(IDS)
    says = r"Pooled computes attention outside .* too: head\.0\. Attach to one of both, model\.inner or model\.head$"
    with attach(model, TempScale(0.3)) as run, pytest.raises(RefusedModel, match=says):
        run(IDS)
    with attach(model.inner, TempScale(0.3)):
        assert not close_model(model(IDS), plain)
    with attach(model, TempScale(0.3), only="encoder"):  # parts were named, and the head is none
        assert not close_model(model(IDS), plain)
    assert torch.equal(model(IDS), plain)
    model.head[0].attends = False
    with attach(model, TempScale(0.3)) as run:
        run(IDS)  # what has a softmax and products need not attend


def test_processes_share_the_gradients_they_know_of(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = models.tiny("llama")
        plain = model(IDS).logits
        parallel = nn.parallel.DistributedDataParallel(model)
        with attach(parallel, TempScale(0.3)) as run:
            assert not close_model(run(IDS).logits, plain)
        with pytest.raises(RefusedModel, match="attach to the plain model first, then wrap that"):
            attach(parallel, GatedHeads())
        with attach(model, GatedHeads()) as run:
            nn.parallel.DistributedDataParallel(model)(IDS).logits.sum().backward()
            assert all(p.grad is not None for p in run.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_an_adapted_projection_is_read_in_no_weights() -> None:
    model = models.tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = LowRank(attention.q_proj)
    wrapper = Adapted(model)
    with pytest.raises(
        RefusedModel, match=r"its q projection is a LowRank of .*, which is more than a linear map; merge"
    ):
        operate(wrapper, PruneHeads(groups=((0, 0),)))
    with pytest.raises(FoldError, match=r"its q projection is a LowRank of .*, which is more than a linear map"):
        fold(wrapper, TempScale(0.3))
    with attach(wrapper, TempScale(0.3)) as run:
        assert run.difference(IDS) > 0


class Adapter(Adapted):
    """As PEFT saves: its own weights, and nothing of the model."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "adapter").touch()


class Sentences(Around):
    """As sentence-transformers saves: the model too."""

    def save_pretrained(self, folder: Path) -> None:
        self.first[0].auto_model.save_pretrained(folder)


def test_a_wrapper_that_leaves_the_model_out_is_told(tmp_path: Path) -> None:
    whole, part = Sentences(models.tiny("llama")), Adapter(models.tiny("llama"))
    with attach(whole, GatedHeads()) as run:
        copy.deepcopy(whole).save_pretrained(tmp_path / "copy")  # the plain model, as any copy
        whole.save_pretrained(tmp_path / "whole")
    assert load(tmp_path / "whole").stack == run.stack
    with pytest.raises(ModelError, match="was saved without a stack"):
        load(tmp_path / "copy")
    told = "Adapter saved what is its own, without GatedHeads"
    with attach(part, GatedHeads()):
        copy.deepcopy(part).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=told):
            part.save_pretrained(tmp_path)
    assert (tmp_path / "adapter").exists()
    assert "save_pretrained" not in vars(whole) | vars(part)
