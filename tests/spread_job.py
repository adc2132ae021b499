"""Tests that two processes run at once, which share a model; test_spread.py starts them."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

import heedful
from heedful import Method, Site
from heedful.adapters.choosing import adapter_for
from heedful.authoring import Call, at
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, RefusedModel
from heedful.facts import fingerprint
from heedful.methods import MAPS, DynamicConv, GatedHeads, Impermissible, SinkRate, SnapKV, TempScale
from tests.samples import PAPER
from tests.test_diagnose_texts import characters

IDS = torch.arange(60).view(2, 30) * 7 % 128
FAR = TempScale(0.5).on(heads=[7])  # of the second process


class Turned(Method):
    """Hands each head's output on to the next head, of whichever process."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def turn(self, x: Tensor, call: Call) -> Tensor:
        return x.roll(1, 1)


@pytest.fixture
def folder() -> Path:
    torch.set_num_threads(1)
    return Path(os.environ["SPREAD_HOME"], "model")


def loaded(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def both(folder: Path) -> tuple[Any, Any]:
    """The model whole, and with its heads in two processes."""
    return loaded(folder), loaded(folder, tp_plan="auto")


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def test_edits_of_any_head(folder: Path) -> None:
    plain, spread = both(folder)
    with torch.no_grad():
        unedited = plain(IDS).logits
        for what in (FAR, Turned(), TempScale(0.7).on(heads=[0]) | FAR):
            found = []
            for model in (plain, spread):
                with heedful.attach(model, what) as run:
                    found.append(run(IDS).logits)
            assert close_model(*found)
            assert not close_model(found[0], unedited)
        assert close_model(spread(IDS).logits, unedited)


def test_readings_of_every_head(folder: Path) -> None:
    found = []
    for model in both(folder):
        with heedful.attach(model, FAR | SinkRate()) as run, torch.no_grad():
            run(IDS)
        found.append(list(run[SinkRate()].importance.values()))
    assert all(close_model(a.float(), b.float()) for a, b in zip(*found, strict=True))
    assert [len(x) for x in found[1]] == [8, 8]
    maps = [heedful.patterns(model, IDS[:1]).tensor for model in both(folder)]
    assert maps[1].shape == (2, 8, 30, 30)
    assert close_model(*maps)


def test_gradients(folder: Path) -> None:
    found = []
    for model in both(folder):
        with heedful.attach(model, FAR | Turned()) as run:
            run(IDS, labels=IDS).loss.backward()
        attention = model.model.layers[0].self_attn
        found.append([whole(p.grad) for p in (*attention.parameters(), model.model.embed_tokens.weight)])
    for a, b in zip(*found, strict=True):
        assert close_model(a, b)


def test_decoding_and_blocks(folder: Path) -> None:
    for what in (FAR, DynamicConv.example().on(layers=[1])):
        found = []
        for model in both(folder):
            torch.manual_seed(0)
            with torch.no_grad(), heedful.attach(model, what) as run:
                found.append(run.generate(IDS[:, :9], max_new_tokens=6, do_sample=False))
        assert torch.equal(*found)


def test_own_part_of_the_pattern(folder: Path) -> None:
    """Whoever asks a model for its weights gets those of its own heads, as without a run."""
    model = loaded(folder, tp_plan="auto")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(IDS, output_attentions=True).attentions
        with heedful.attach(model, SinkRate()) as run:
            found = run(IDS, output_attentions=True).attentions
    assert found[0].shape[1] == 4
    assert all(map(close_model, found, plain))


def test_weights(folder: Path) -> None:
    plain, spread = both(folder)
    assert fingerprint(plain) == fingerprint(spread)
    assert heedful.fit(MAPS(), spread, ()) == heedful.fit(MAPS(), plain, ())


def test_refusals(folder: Path) -> None:
    spread = loaded(folder, tp_plan="auto")
    with (
        heedful.attach(spread, SnapKV(budget=4)) as run,
        pytest.raises(RefusedModel, match="what CACHE steps would keep"),
    ):
        run(IDS, use_cache=True)
    with heedful.attach(spread, GatedHeads()) as run:
        with torch.no_grad():
            run(IDS)
        with pytest.raises(RefusedModel, match="its 8 heads are spread over processes, and what methods learn is not"):
            run(IDS)
    with heedful.attach(spread, Impermissible(), roles={"impermissible": ((2, 9),)}) as run:
        with torch.no_grad():
            run(IDS)
            assert run.loss() > 0
        with pytest.raises(RefusedModel, match="the gradient of what methods penalise would count once for each"):
            run(IDS)
    with pytest.raises(RefusedModel, match="is spread over 2 processes; load the model whole"):
        heedful.fold(spread, TempScale(0.5))
    with pytest.raises(FieldError, match="these weights are spread over processes that must do the same"):
        heedful.diagnose(spread, Path(__file__), tokenizer=characters(), workers=2)
    other: Any = nn.TransformerEncoderLayer(8, 2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    other.linear1.weight = nn.Parameter(distribute_tensor(other.linear1.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(RefusedModel, match="is no model of transformers, and its weights are spread over processes"):
        adapter_for(other)
    uneven = loaded(folder, tp_plan="auto")
    uneven.model.layers[1].self_attn.config.num_attention_heads = 10
    with (
        heedful.attach(uneven, SinkRate()) as run,
        pytest.raises(RefusedModel, match="4 of them in this one of 2 is no"),
    ):
        run(IDS)


def sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def test_weights_that_are_whole_when_used(folder: Path) -> None:
    plain, cut = loaded(folder), sharded(loaded(folder))
    found = []
    for model in (plain, cut):
        with heedful.attach(model, FAR | SinkRate()) as run, torch.no_grad():
            found.append(run(IDS).logits)
    assert close_model(*found)
    with pytest.raises(RefusedModel, match="fully_shard shares the gradients of the parameters that it was made with"):
        heedful.attach(cut, GatedHeads())


def test_what_is_learned_is_shared(folder: Path) -> None:
    """Attached first and sharded then, a method's own parameters get the mean gradient over both processes' texts."""
    rank, found = dist.get_rank(), []
    for cut in (False, True):
        model = loaded(folder)
        torch.manual_seed(0)
        with heedful.attach(model, GatedHeads()) as run:
            if cut:
                sharded(model)
                (model(IDS[rank:][:1], labels=IDS[rank:][:1]).loss).backward()
            else:
                sum(model(x[None], labels=x[None]).loss for x in IDS).div(2).backward()
            found.append({n: whole(p.grad) for n, p in model.named_parameters() if "heedful_" in n})
        assert found[-1]
        assert run.activity().entered
    assert all(close_model(found[0][name], x) for name, x in found[1].items())


def main(rank: int, home: Path) -> None:
    """One of the two processes, told what torchrun tells; where they meet is a file, since a port may be taken."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "SPREAD_HOME": str(home)}
    dist.init_process_group("gloo", init_method=f"file://{home / 'meeting'}", rank=rank, world_size=2)
    with (home / f"{rank}.txt").open("w") as said, redirect_stdout(said):
        failed = pytest.main([__file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "default"])
    dist.destroy_process_group()
    sys.exit(failed)
