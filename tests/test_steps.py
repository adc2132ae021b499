"""What a run adds to each token that a model writes is few operations and few calls of Python's.

They are counted: time on a busy machine says little.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from benchmarks.speed.decoding import RUNS, Operations, added, read, step
from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.call import CachedKV, Call
from heedful.core.errors import RefusedModel, UnknownArgument
from heedful.core.method import Method, Stack
from heedful.core.positions import Positions
from heedful.core.sites import Site, at
from heedful.methods import KIVI, KNorm, PyramidKV, SinkWindow, SnapKV, TempScale
from heedful.tiny import tiny

from .samples import PAPER

MODEL = tiny("llama", num_hidden_layers=3)
IDS = torch.arange(3, 99).view(1, 96)
# for a layer: operations beyond the model's 44, looks at numbers, and calls of functions written in Python, of which
# some 35 are a third of those of a whole forward: what was found, and a few to spare
FEW = {
    "attached, nothing to do": (2, 0, 86),
    "SinkRate": (2, 0, 130),
    "KNorm, a quarter": (26, 2, 204),
    "TOVA, a quarter": (30, 2, 215),
    "HeavyHitter, a quarter": (50, 2, 330),
    "SnapKV, a quarter": (50, 2, 248),
    "window": (32, 2, 297),
    "pyramid": (54, 2, 255),
    "scores": (24, 2, 262),
    "codes": (58, 4, 565),
    "ThinK": (48, 9, 435),
}
MORE: dict[str, Method] = {
    "window": SinkWindow(4, 32),
    "pyramid": PyramidKV(0.5, 8),
    "scores": TempScale(1.1),
    "codes": KIVI(residual=32),
}


@pytest.mark.parametrize("name", FEW)
def test_a_step_adds_few_operations(name: str) -> None:
    operations, looks = added(MODEL, IDS, {**RUNS, **MORE}[name])
    assert operations <= FEW[name][0]
    assert looks <= FEW[name][1]
    assert added_calls({**RUNS, **MORE}[name]) <= FEW[name][2]
    acts = FEW[name][1] > 0  # and then some were counted: a count of nothing would be few as well
    assert (operations > FEW["SinkRate"][0]) is acts
    assert (looks > 0) is acts


def calls_of_python(cache: object) -> int:
    """How many functions written in Python one step calls."""
    calls = 0

    def count(frame: object, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step(MODEL, cache, IDS[:, :1])
    finally:
        sys.setprofile(None)
    return calls


@torch.no_grad()
def added_calls(what: Stack | Method) -> float:
    """How many of them a run adds for each layer, once what stays the same is known."""
    plain = calls_of_python(read(MODEL, IDS))
    with attach(MODEL, what):
        cache = read(MODEL, IDS)
        for i in range(3):
            step(MODEL, cache, IDS[:, i : i + 1])
        return (calls_of_python(cache) - plain) / MODEL.config.num_hidden_layers


@torch.no_grad()
def test_a_layer_in_which_nothing_acts_is_not_looked_into() -> None:
    plain, cache = calls_of_python(read(MODEL, IDS)), read(MODEL, IDS)
    with attach(MODEL, Stack()) as run:
        step(MODEL, cache, IDS[:, :1])  # what is known of classes is found once
        assert calls_of_python(cache) < 1.5 * plain
        assert run.activity().entered == (0, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_it_is_where_it_attends_to_keys_of_another_layer_which_dropped_some(kernel: str) -> None:
    few = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "num_kv_shared_layers": 1}
    words = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**few, **heads, **words, layer_types=["full_attention"] * 3)).eval()
    model.set_attn_implementation(kernel)
    with attach(model, SnapKV(0.25, window=4).on(layers=1)) as run:
        cache = run(input_ids=IDS, use_cache=True)[CACHE]
        with pytest.raises(UnknownArgument, match=r"layers\.2.* attends to the keys of another layer, .* dropped"):
            run(input_ids=IDS[:, :1], **{CACHE: cache})


def test_views_are_no_operations_and_looks_are_counted() -> None:
    with Operations() as counted:
        x = torch.zeros(3).view(3, 1).expand(3, 2)
        float((x + 1).sum())
    assert (counted.done, counted.looks) == (4, 1)  # zeros, the sum of two, the sum of all, and the look
    x = torch.zeros(3, 2)
    mask = x == 0
    with Operations() as counted:
        y = x[mask]
        x[mask] = 1.0
        x[torch.zeros(1, dtype=torch.long)]
        y.unique(), y.unique_consecutive(), x.unique(dim=0)
    assert counted.looks == 5  # by a mask twice, and what is told apart


class Told(Method):
    """Tells what a CACHE edit knows of its entries, without a look at them."""

    paper = PAPER

    @at(Site.CACHE)
    def tell(self, entries: CachedKV, call: Call) -> torch.Tensor:
        KNOWN.append((entries.whole, call.one_token, entries.positions.end))
        assert entries.positions.end == int(entries.positions.index.max()) + 1
        return entries.is_text & (entries.positions.position != 1)


KNOWN: list[tuple[bool, bool, int]] = []


@pytest.mark.parametrize("padding", [slice(0), slice(3), slice(9, 12)], ids=["none", "left", "right"])
def test_padding_is_looked_for_where_there_may_be_some(padding: slice) -> None:
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, padding] = 0
    padded = not mask.all()
    KNOWN.clear()
    with attach(MODEL, Told()) as run:
        run.generate(input_ids=IDS[:, :12], attention_mask=mask, max_new_tokens=3, do_sample=False)
    layers = MODEL.config.num_hidden_layers
    assert [(not padded, not padded and i > 0, 12 + i) for i in range(3) for _ in range(layers)] == KNOWN


def test_places_know_their_end_and_whether_all_are_text() -> None:
    row = Positions.row(3, 5)
    assert (row.whole, row.end, row.take(slice(1, 3)).end) == (True, 8, 6)
    some = row.take(torch.tensor([0, 2]))
    assert (some.whole, some.end) == (True, 6)
    assert not Positions.row(3, 5, pad=torch.tensor([2])).whole
    assert not Positions.row(3, 5, is_filled=torch.ones(1, 1, 5, dtype=torch.bool)).whole
    assert Positions(row.index, row.index + 1, last=9).end == 10
    assert not Positions(row.index, row.index + 1, last=9).whole


@torch.no_grad()
def test_a_call_that_failed_before_it_reached_a_cut_cache_opens_it_to_no_plain_model() -> None:
    with attach(MODEL, KNorm(0.5)):
        cut = read(MODEL, IDS)
        handle = MODEL.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(MODEL, cut, IDS[:, :1])
        handle.remove()
    with pytest.raises(RefusedModel, match="dropped, and for 2 tokens at once"):
        MODEL(input_ids=IDS[:, :2], **{CACHE: cut})


@torch.no_grad()
def test_a_plain_model_goes_on_from_a_cut_cache_token_by_token_alone() -> None:
    with attach(MODEL, KNorm(0.5)):
        cut = read(MODEL, IDS)
    one, several = copy.deepcopy(cut), copy.deepcopy(cut)
    with pytest.raises(RefusedModel, match=r"dropped, and for 2 tokens at once.*go on inside a run.*Stack\(\)"):
        MODEL(input_ids=IDS[:, :2], **{CACHE: several})
    for i in range(2):
        found = MODEL(input_ids=IDS[:, i : i + 1], **{CACHE: one}).logits
    with attach(MODEL, Stack()) as run:
        wanted = run(input_ids=IDS[:, :2], **{CACHE: cut}).logits[:, 1:]
    assert close_model(found, wanted)
