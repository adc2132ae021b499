"""What a call knows of the model's own call: which tokens it was given, and whether it is training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache

from heedful import attach, edit, nn
from heedful.adapters.cache_name import CACHE
from heedful.adapters.layers import highest, lowest
from heedful.api import _FitContext
from heedful.conformance.tolerances import close_model
from heedful.conformance.torch_model import TinyTorch
from heedful.core.call import CachedKV, Call
from heedful.core.errors import SiteError
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.sites import Site, at, reads
from heedful.kit.told import at_places, token_ids
from heedful.methods import GlobalLocalCrossAttention, HistoGraph, LM4VisualEncoding
from heedful.tiny import tiny, tiny_inputs

from .samples import PAPER
from .test_checkpointing import checkpointed

IDS = torch.arange(3, 27).view(2, 12)
SEEN: list[tuple[str, Any]] = []  # of each call: the layer's name, and what was found there
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


@pytest.fixture(autouse=True)
def _none_so_far() -> None:
    SEEN.clear()


class Tokens(Method):
    """Notes which tokens queries and keys are of."""

    paper = PAPER

    @at(Site.MASK)
    def look(self, mask: Mask, call: Call) -> Mask:
        ids = token_ids(call)
        SEEN.append((call.name, (at_places(ids, call.queries), at_places(ids, call.keys))))
        return mask


class Own(Method):
    """Notes the queries' alone, as far as they are known."""

    paper = PAPER

    @reads(Site.QUERY)
    def look(self, query: Tensor, call: Call) -> None:
        SEEN.append((call.name, call.ids))


class Training(Method):
    """Notes whether the layer is training, where it is asked early and late."""

    paper = PAPER

    def idle(self, call: Call) -> bool:
        SEEN.append(("idle", call.training))
        return False

    @reads(Site.HIDDEN)
    def early(self, hidden: Tensor, call: Call) -> None:
        SEEN.append(("early", call.training))

    @reads(Site.QUERY)
    def late(self, query: Tensor, call: Call) -> None:
        SEEN.append(("late", call.training))


class Forgetful(Method):
    """Keeps every other entry, others for each key head."""

    paper = PAPER

    @at(Site.CACHE)
    def forget(self, entries: CachedKV, call: Call) -> Tensor:
        index = entries.positions.index.expand(*entries.key.shape[:2], -1)
        return index % 2 == torch.arange(entries.key.shape[1])[:, None] % 2


def queries() -> list[Tensor]:
    return [q[:, 0] for _, (q, _) in SEEN]


def keys() -> list[Tensor]:
    return [k[:, 0] for _, (_, k) in SEEN]


def test_tokens_of_a_whole_text() -> None:
    with attach(tiny("llama"), Tokens()) as run:
        run(IDS)
    assert [name for name, _ in SEEN] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(torch.equal(found, IDS) for found in (*queries(), *keys()))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_tokens_before_those_of_the_call(kind: Any) -> None:
    model = tiny("llama")
    cache = DynamicCache() if kind is DynamicCache else StaticCache(config=model.config, max_cache_len=20)
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    with torch.no_grad(), attach(model, Tokens()) as run:
        for start, stop in ((0, 5), (5, 11), (11, 12)):
            run(IDS[:, start:stop], attention_mask=padded[:, :stop], **{CACHE: cache})
            assert torch.equal(queries()[-1], IDS[:, start:stop])
            assert torch.equal(keys()[-1][:, :stop], IDS[:, :stop])


def test_tokens_under_beams_and_guesses() -> None:
    """Every call's keys are those of the rows that beams chose: each token after another that was generated so."""
    model = tiny("llama")
    with torch.no_grad(), attach(model, Tokens()) as run:
        found = run.generate(IDS, num_beams=3, num_return_sequences=3, max_new_tokens=8, do_sample=False)
        last = keys()[-1]
        assert last.shape[1] == found.shape[1] - 1
        rows = {tuple(row) for row in last.tolist()}
        assert {tuple(row) for row in found[:, :-1].tolist()} & rows
        assert {row[: IDS.shape[1]] for row in rows} == {tuple(row) for row in IDS.tolist()}
        SEEN.clear()
        again = IDS[:1].repeat(1, 3)
        found = run.generate(again, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
    longest = max(keys(), key=lambda x: x.shape[1])
    known = min(found.shape[1], longest.shape[1]) - 3  # guesses at the end may be taken back
    assert torch.equal(longest[:, :known], found[:, :known])


def test_tokens_of_keys_that_are_left() -> None:
    cache = DynamicCache()
    with torch.no_grad(), attach(tiny("llama"), Forgetful() | Tokens()) as run:
        run(IDS[:, :10], **{CACHE: cache})
        run(IDS[:, 10:], **{CACHE: cache})
    found = SEEN[-1][1][1]
    for head in range(2):
        assert torch.equal(found[:, head], torch.cat([IDS[:, head:10:2], IDS[:, 10:]], 1))


def test_tokens_of_the_model_around_the_layer() -> None:
    """In an encoder-decoder those of each half; where a model is handed embeddings or images, none."""
    model, more = tiny("t5"), IDS[:, :7] + 40
    with attach(model, Own()) as run:
        run(input_ids=IDS, decoder_input_ids=more)
    for name, found in SEEN:
        assert torch.equal(found, more if name.startswith("decoder") else IDS)
    SEEN.clear()
    model = tiny("llava")
    with attach(model, Own()) as run:
        run(**tiny_inputs(model))
    assert SEEN
    assert all(found is None for _, found in SEEN)


def test_tokens_of_a_model_of_plain_torch() -> None:
    with attach(TinyTorch(), Tokens()) as run:
        run(IDS)
    assert torch.equal(queries()[0], IDS)
    assert torch.equal(keys()[-1], IDS)


def test_where_tokens_are_not_known_it_is_said_why() -> None:
    model = tiny("llama")
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad(), attach(model, Tokens()) as run:
        with pytest.raises(SiteError, match=r"layer 0: a method asks which tokens .* hand it ids, not inputs_embeds"):
            run(inputs_embeds=embeds)
        run(IDS)
        with pytest.raises(SiteError, match="hand it ids"):
            run(inputs_embeds=embeds)
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS[:, :6], **{CACHE: cache})
        with attach(model, Tokens()) as run, pytest.raises(SiteError, match="that were read without it; read the text"):
            run(IDS[:, 6:], **{CACHE: cache})
    with attach(tiny("bart"), Tokens()) as run, pytest.raises(SiteError, match="keys of another sequence"):
        run(input_ids=IDS, decoder_input_ids=IDS)
    module = nn.Attention(16, 2, Tokens(), batch_first=True)
    with pytest.raises(SiteError, match="hand it ids"):
        module(*[torch.randn(2, 5, 16)] * 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_knows_it_too(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    with attach(model, Own()) as run:
        loss = run(IDS, labels=IDS, use_cache=False).loss
        first = len(SEEN)
        loss.backward()
    assert len(SEEN) == 2 * first
    assert all(torch.equal(found, IDS) for _, found in SEEN)


def test_a_whole_model_that_is_computed_again_knows_it_too() -> None:
    model = TinyTorch().train()
    with attach(model, Own() | Training(), inputs=(IDS,)) as run:
        checkpoint(lambda ids: run(ids).logits, IDS, use_reentrant=False).sum().backward()
    found = [x for name, x in SEEN if name.startswith("layers")]
    assert len(found) == 6
    assert all(torch.equal(x, IDS) for x in found)
    assert all(x for name, x in SEEN if name in ("idle", "early", "late"))


@pytest.mark.parametrize("kind", ["llama", "torch", "module"])
def test_whether_a_layer_is_training(kind: str) -> None:
    if kind == "module":
        module = nn.Attention(16, 2, Training(), batch_first=True)
        for training in (True, False):
            module.train(training)(*[torch.randn(2, 5, 16)] * 3)
    else:
        model: Any = tiny() if kind == "llama" else TinyTorch()
        with attach(model, Training()) as run:
            run(IDS[:, :1])  # which tells a model of torch's layers
            SEEN.clear()
            for training in (True, False):
                model.train(training)
                run(IDS)
    half = len(SEEN) // 2
    assert half >= 3
    assert all(training for _, training in SEEN[:half])
    assert not any(training for _, training in SEEN[half:])
    assert {where for where, _ in SEEN} == {"idle", "early", "late"}


def test_a_layer_that_is_frozen_says_so_of_itself() -> None:
    model = tiny("llama").train()
    model.model.layers[1].self_attn.eval()
    with attach(model, Training()) as run:
        run(IDS)
    assert [training for where, training in SEEN if where == "late"] == [True, False]


class Halves(Method):
    """In training queries are twice as long, at rest half."""

    paper = PAPER

    @at(Site.QUERY, training=True)
    def more(self, query: Tensor, call: Call) -> Tensor:
        return query * 2

    @at(Site.QUERY, training=False)
    def less(self, query: Tensor, call: Call) -> Tensor:
        return query / 2


def test_a_step_may_be_of_training_or_of_rest_alone() -> None:
    model = tiny("llama")
    with attach(model, Halves()) as run, torch.no_grad():
        for training, factor in ((True, 2.0), (False, 0.5), (True, 2.0)):
            found = run.model.train(training)(IDS).logits
            assert run.active
            with attach(tiny("llama"), edit(Site.QUERY, lambda q, call, factor=factor: q * factor)) as other:
                assert torch.equal(found, other(IDS).logits)


def test_nothing_is_kept_for_who_does_not_ask() -> None:
    """No state with a cache, and no ids in what a run remembers of its calls."""
    cache = DynamicCache()
    with torch.no_grad(), attach(tiny("llama"), Own()) as run:
        run(IDS, **{CACHE: cache})
    assert type(cache) is DynamicCache
    assert all(call.ids is None for call in run.state.calls.values())


class Below(Method):
    """Notes which layer each goes on from, asked early and late."""

    paper = PAPER

    @reads(Site.HIDDEN)
    def early(self, hidden: Tensor, call: Call) -> None:
        SEEN.append((call.name, call.below))

    @reads(Site.QUERY)
    def late(self, query: Tensor, call: Call) -> None:
        SEEN.append((call.name, call.below))


@pytest.mark.parametrize(
    ("model", "inputs", "below"),
    [
        (tiny("bart"), tiny_inputs(tiny("bart")), [None, 0, None, 2, 3, 4]),  # two encoder layers, two of a decoder
        (TinyTorch(), {"input_ids": IDS}, [None, 0, 1]),
    ],
)
def test_a_call_knows_which_layer_it_goes_on_from(model: Any, inputs: dict[str, Tensor], below: list[Any]) -> None:
    with attach(model, Below()) as run, torch.no_grad():
        run(**inputs)
        numbers = {name: i for i, name in enumerate(run.layer_names)}
    assert sorted({(numbers[name], found) for name, found in SEEN}) == list(enumerate(below))


def test_layers_follow_one_another_within_their_list() -> None:
    names = (
        "encoder.block.0.layer.0.SelfAttention", "encoder.block.1.layer.0.SelfAttention", "decoder.layers.0.self_attn",
        "decoder.layers.0.encoder_attn", "decoder.layers.1.self_attn", "pooler.attn", "0.attn", "1.attn",
    )  # fmt: skip
    assert lowest(names) == (0, 0, 2, 2, 2, 5, 6, 6)
    assert highest(names) == (1, 1, 4, 4, 4, 5, 7, 7)
    at = Positions.row(0, 1)
    calls = [Call(i, 8, name, 1, 1, at, at, 1.0, lowest=lowest(names)[i]) for i, name in enumerate(names)]
    assert [call.below for call in calls] == [None, 0, None, 2, 3, None, None, 6]
    assert [call.ends_list for call in calls] == [False] * 7 + [True]
    calls = [replace(call, highest=last) for call, last in zip(calls, highest(names), strict=True)]
    assert [call.ends_list for call in calls] == [False, True, False, False, True, True, False, True]
    assert [call.last_layer for call in calls] == [False] * 7 + [True]
    lists = [range(2)] * 2 + [range(2, 5)] * 3 + [range(5, 6)] + [range(6, 8)] * 2
    assert [call.listed for call in calls] == lists


class Ends(Method):
    paper = PAPER

    @reads(Site.HEAD_OUTPUT)
    def see(self, heads: Tensor, call: Call) -> None:
        SEEN.append((call.layer, call.ends_list))


def test_a_layer_is_told_what_ends_its_list_as_a_call_is() -> None:
    for model in (tiny("llava"), tiny("bart"), TinyTorch()):
        with attach(model, Ends()) as run:
            run(**(tiny_inputs(model) if hasattr(model, "config") else {"input_ids": IDS}))
            assert {size.number: size.ends_list for size in run._adapter.sizes()} == dict(SEEN)
        if hasattr(model, "config"):
            assert {size.number: size.ends_list for size in _FitContext(model, None).layers} == dict(SEEN)
            assert [ends for _, ends in SEEN].count(True) == 2
        SEEN.clear()
    module = nn.Attention(8, 2, layer=1, depth=2)
    assert [size.ends_list for size in module.run._adapter.sizes()] == [True]
    assert not nn.Attention(8, 2, layer=0, depth=2).run._adapter.sizes()[0].ends_list


@pytest.mark.parametrize("kind", [LM4VisualEncoding, HistoGraph, GlobalLocalCrossAttention])
def test_what_stands_behind_an_encoder_stands_there_whatever_comes_behind(kind: type[Method]) -> None:
    model = tiny("llava")
    inputs, found = tiny_inputs(model), []
    hook = model.model.vision_tower.register_forward_hook(lambda _, __, out: found.append(out.last_hidden_state))
    model(**inputs)
    for only in (None, ("model.vision_tower",)):
        with attach(model, kind.example(), only=only) as run:
            run(**inputs)
    hook.remove()
    plain, whole, alone = found
    assert torch.equal(whole, alone)
    assert not close_model(whole, plain)


class Places(Method):
    """Notes where queries stand, and which of them are text."""

    paper = PAPER

    @reads(Site.HIDDEN)
    def early(self, x: Tensor, call: Call) -> None:
        self.look(x, call)

    @reads(Site.PATTERN)
    def look(self, x: Tensor, call: Call) -> None:
        if call.cross:
            rows = (x.expand(len(IDS), -1, -1).cpu() for x in (call.q_pos, call.is_text))
            SEEN.append((call.name, tuple(x[:, 0].tolist() for x in rows)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_queries_of_cross_attention_stand_in_their_own_text(kind: str, side: str) -> None:
    """Not in the other, whose padding is another."""
    model = tiny(kind)
    padding = torch.ones_like(IDS)
    padding[1, slice(8) if side == "left" else slice(4, None)] = 0
    own = torch.ones(2, 9, dtype=torch.long)
    own[0, 7:] = 0
    given = {"input_ids": IDS, "attention_mask": padding, "decoder_input_ids": IDS[:, :9]}
    with attach(model, Places()) as run:
        run(**given, decoder_attention_mask=own)
        crossed = [i for i, name in enumerate(run.layer_names) if name in dict(SEEN)]
    with attach(model, Places().on(layers=crossed)) as run:  # the self attention before them is left alone
        run(**given, decoder_attention_mask=own)
    assert len(SEEN) == 8
    assert all(found == ([list(range(9))] * 2, own.bool().tolist()) for _, found in SEEN)


def test_queries_of_cross_attention_go_on_where_the_text_stopped() -> None:
    model = tiny("bart")
    for only in (None, [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]):
        SEEN.clear()
        with attach(model, Places(), only=only) as run:
            run.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1)
        assert [found[0][0] for _, found in SEEN] == [[i] for i in (0, 1, 2) for _ in range(4)]
