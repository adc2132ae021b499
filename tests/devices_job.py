"""A model whose layers stand on two devices, one of which is not there: started by test_spread.py."""

from __future__ import annotations

import copy

import torch
from accelerate import dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM

from heedful import attach
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close, close_model
from heedful.methods import SinkRate, SnapKV, TempScale

from .elsewhere import elsewhere


def main() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=128, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    whole, ids = LlamaForCausalLM(config).eval(), torch.arange(3, 33)[None]
    with elsewhere() as device, torch.no_grad():
        places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu")
        places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), str(device))
        spread = dispatch_model(copy.deepcopy(whole), places, main_device="cpu", force_hooks=True)
        assert {x.device.type for x in spread.parameters()} == {"cpu", device.type}
        logits, shares = [], []
        for model in (whole, spread):
            with attach(model, SinkRate() | TempScale(0.5)) as run:
                logits.append(run(ids).logits.cpu())
                found = run[SinkRate()].importance
            shares.append({layer: x.cpu() for layer, x in found.items()})
            with attach(model, SnapKV(budget=12)) as run:
                cache = cache_of(run(ids, use_cache=True))
                logits.append(run(ids[:, :1], **{CACHE: cache}).logits.cpu())
        for one, other in zip(logits[:2], logits[2:], strict=True):
            assert close_model(one, other)
        assert shares[0].keys() == shares[1].keys() == {0, 1}
        assert all(close(shares[0][layer], shares[1][layer]) for layer in shares[0])


if __name__ == "__main__":
    main()
