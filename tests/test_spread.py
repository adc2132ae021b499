"""A model whose heads or weights stand in two processes computes what it does in one, or is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from heedful import attach
from heedful.adapters.lazymask import LazyMask, lazy_mask
from heedful.conformance.tolerances import close_model
from heedful.core.positions import Pairs, Positions
from heedful.methods import GatedHeads

from . import spread_job
from .apart import APART, SECONDS
from .spread_job import IDS


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=128, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    both = [APART.Process(target=spread_job.main, args=(rank, tmp_path)) for rank in (0, 1)]
    try:
        for process in both:
            process.start()
        for process in both:
            process.join(SECONDS)
    finally:
        for process in both:
            process.kill()
            process.join()
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in both] == [0, 0], "\n".join(said)
    assert all("9 passed" in x for x in said)


def test_layers_on_two_devices_do_what_they_do_on_one() -> None:
    """As accelerate has it under a `device_map`; the second device refuses the first one's tensors."""
    told = subprocess.run([sys.executable, "-m", "tests.devices_job"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]


def test_a_mask_goes_to_another_device_as_a_rule() -> None:
    """A `device_map` hands it on from layer to layer: whole it would have n x n numbers on each device."""
    seen = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    later = sliding_window_causal_mask_function(2)
    for additive, function in ((False, causal_mask_function), (True, later)):
        made = lazy_mask(2, 4, 4, mask_function=function, attention_mask=seen, additive=additive)
        there = made.to("meta")
        assert isinstance(there, LazyMask)
        assert (there.device.type, there.dtype, there.shape) == ("meta", made.dtype, made.shape)
        assert there.spec is made.to("meta").spec
        assert there.whole.device.type == "meta"
        back = there.to("cpu")
        assert isinstance(back, LazyMask)
        assert back.spec is made.spec
        assert not isinstance(made.to(torch.float64), LazyMask)
    pairs = Pairs(Positions.row(0, 4), Positions.row(0, 4), 1, slice(0, 4), slice(0, 4))
    assert torch.equal(there.spec.mask.rules[0].keeps(pairs), made.spec.mask.rules[0].keeps(pairs))


def test_weights_that_others_put_there_are_used() -> None:
    """`load_state_dict(assign=True)` replaces the parameters themselves."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )
    model = LlamaForCausalLM(config)
    with attach(model, GatedHeads()) as run, torch.no_grad():
        before = run(IDS).logits
        state = {n: x + 3.0 if "heedful_" in n else x.clone() for n, x in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        after = run(IDS).logits
        assert not close_model(after, before)
        assert all(isinstance(p, nn.Parameter) for p in run.parameters())
        assert {id(p) for p in run.parameters()} <= {id(p) for p in model.parameters()}
