"""What methods remember: for the forward, for the run, and with the cache of a text."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from heedful import attach
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.adapters.carried import shelf_of
from heedful.adapters.kvcache import cache_bytes
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.core.state import ByIndex, Key, Notes, Shelf, Until
from heedful.methods.intervene.language.pasta import PASTA
from heedful.methods.intervene.vision.var import VAR
from heedful.methods.intervene.vision.vhr import VHR
from heedful.tiny import tiny

from .samples import PAPER, Scale, notes_in

IDS = torch.arange(3, 27).view(2, 12)
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


class Seen(Method):
    """Keeps with the cache, at a site of every kind, how many tokens of each text it has seen there."""

    paper = PAPER

    def count(self, name: str, call: Call) -> None:
        is_text = call.is_text[:, 0].sum(-1).expand(call.batch or 0)
        call.state.cache[name] = call.state.cache.get(name, torch.zeros_like(is_text)) + is_text

    @reads(Site.HIDDEN)
    def look(self, hidden: Tensor, call: Call) -> None:
        self.count("hidden", call)

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        self.count("mask", call)
        return mask


class Description(Method):
    """The same at the end of a layer; gives what it has seen to the heads of the next call."""

    paper = PAPER
    by: float = 0.1

    @at(Site.PATTERN)
    def scale(self, pattern: Tensor, call: Call) -> Tensor:
        seen = call.state.cache.get("seen")
        return pattern if seen is None else pattern * (1 + self.by * seen[:, None, None, None])

    @reads(Site.RESIDUAL)
    def look(self, stream: Tensor, call: Call) -> None:
        is_text = call.is_text[:, 0].sum(-1).expand(len(stream))
        call.state.cache["seen"] = call.state.cache.get("seen", torch.zeros_like(is_text)) + is_text
        call.state.cache["norm"] = ByIndex(
            torch.cat([call.state.cache.get("norm", stream[:, :0, 0]), stream.norm(dim=-1)], 1), 1
        )


def notes(cache: Any) -> Notes:
    return Notes(shelf_of(cache), Key(("A()",), "A()", "layer"), 2)


def filled() -> tuple[DynamicCache, Notes]:
    cache = DynamicCache()
    cache.update(torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3), 0)
    mine = notes(cache)
    mine["row"] = torch.tensor([1.0, 2.0])
    mine["token"] = ByIndex(torch.arange(8).view(2, 4), 1)
    return cache, mine


def test_what_happens_to_the_cache_happens_to_what_is_kept_with_it() -> None:
    cache, mine = filled()
    assert isinstance(cache, DynamicCache)
    twin, stored = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-1)
    assert mine["row"].tolist() == [2, 1]
    assert mine["token"].tolist() == [[4, 5, 6], [0, 1, 2]]
    cache.batch_repeat_interleave(2)
    assert mine["row"].tolist() == [2, 2, 1, 1]
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert mine["token"].tolist() == [[4, 5, 6], [0, 1, 2]]
    for other in (twin, stored):
        assert type(other) is type(cache)
        assert notes(other)["row"].tolist() == [1, 2]
        assert notes(other)["token"].shape == (2, 4)
    cache.reset()
    assert not mine


def test_what_is_kept_counts_among_the_bytes_of_the_cache() -> None:
    cache, _ = filled()
    alone = DynamicCache()
    alone.update(cache.layers[0].keys, cache.layers[0].values, 0)
    assert cache_bytes(cache) - cache_bytes(alone) == 2 * 4 + 8 * 8


def test_a_cache_with_which_nothing_is_kept_stays_what_it_is() -> None:
    cache = DynamicCache()
    assert notes(cache).get("row") is None
    assert type(cache) is DynamicCache
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_what_beams_could_not_reorder_is_refused() -> None:
    for wrong in (torch.ones(1, 3), torch.tensor(1.0), ByIndex(torch.ones(3, 2), 0)):
        with pytest.raises(FieldError, match=r"cache\['x'\] = .*must be a tensor \[b \.\.\.\] .* of 2 texts"):
            notes(DynamicCache())["x"] = wrong


def test_another_stack_sees_nothing_and_takes_the_place() -> None:
    cache, mine = filled()
    theirs = Notes(shelf_of(cache), Key(("B()",), "B()", "layer"), 2)
    reader = Notes(shelf_of(cache), Key((), "C()", "layer"), 2)
    reader["row"] = torch.ones(2)
    assert "row" not in theirs
    assert "row" in mine, "looking changes nothing"
    theirs["row"] = torch.zeros(2)
    assert not mine
    assert "row" in reader, "who only reads is in nobody's way"


@torch.no_grad()
def test_every_site_may_keep_what_lives_with_the_cache() -> None:
    model, mask = tiny("llama"), torch.ones_like(IDS)
    mask[1, :5] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with attach(model, Seen() | Scale()) as run:
        cache = run(input_ids=IDS[:, :8], attention_mask=mask[:, :8], position_ids=place[:, :8])[CACHE]
        run(input_ids=IDS[:, 8:], attention_mask=mask, position_ids=place[:, 8:], **{CACHE: cache})
        for layer in range(2):
            assert {k: x.tolist() for k, x in notes_in(cache, layer).items()} == {"hidden": [12, 7], "mask": [12, 7]}
        run(input_ids=IDS, use_cache=False)
        fresh = [kept for shelf in run.state.now.shelves.values() for kept in shelf._kept.values()]
    assert [x["mask"].tolist() for x in fresh] == [[12, 12]] * 2, "without a cache every call begins anew"


@torch.no_grad()
def test_two_parts_of_one_kind_see_their_own() -> None:
    model = tiny("llama")
    with attach(model, Description() | Description() | Description(0.2)) as run:
        cache = run(input_ids=IDS)[CACHE]
    kept = shelf_of(cache)._kept
    assert sorted({key.part for key in kept}) == sorted({*run.state._names})
    assert len(run.state._names) == len(set(run.state._names)) == 3
    assert all(x["seen"].tolist() == [12, 12] for x in kept.values())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_other_caches_carry_it_too(kind: str, static: bool) -> None:
    model = tiny(kind)

    def read(ids: Tensor, more: tuple[Tensor, ...], order: list[int] | None = None) -> Tensor:
        with attach(model, Description()) as run:
            cache = StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
            run(input_ids=ids, **{CACHE: cache})
            for i, x in enumerate(more):
                if order is not None and i == 1:
                    cache.reorder_cache(torch.tensor(order))
                found: Tensor = run(input_ids=x, **{CACHE: cache}).logits[:, -1]
        return found

    later = torch.tensor([[7], [9]]), torch.tensor([[30, 31], [32, 33]]), torch.tensor([[40], [41]])
    found = read(IDS, later, [1, 0])
    for row, source in ((0, 1), (1, 0)):
        alone = read(IDS[source][None], (later[0][source][None], *(x[row][None] for x in later[1:])))
        assert close_model(found[row], alone[0])


@torch.no_grad()
def test_attention_to_an_encoder_carries_it_too() -> None:
    model = tiny("bart")
    how: dict[str, Any] = dict(
        max_new_tokens=5, num_beams=4, num_return_sequences=4, do_sample=False, eos_token_id=None, pad_token_id=0,
        forced_eos_token_id=None, output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
    )  # fmt: skip
    with attach(model, Description()) as run:
        found = run.generate(input_ids=IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **how)
        for text, score in zip(found.sequences, found.sequences_scores, strict=True):
            out, total = run(input_ids=IDS[:1], decoder_input_ids=text[None, :1], use_cache=True), torch.zeros(())
            for token in text[1:]:
                total = total + out.logits[0, -1].log_softmax(-1)[token]
                known = {"encoder_outputs": (out.encoder_last_hidden_state,), CACHE: cache_of(out)}
                out = run(**known, decoder_input_ids=token.view(1, 1), use_cache=True)
            assert close_model(score, total)
    assert {key.module.split(".")[-1] for key in shelf_of(cache_of(out))._kept} == {"encoder_attn"}


@pytest.mark.parametrize("method", [VAR.example(), PASTA(alpha=0.1), VHR(alpha=3.0), Description()])
@torch.no_grad()
def test_beams_score_a_text_as_it_scores_alone(method: Method) -> None:
    model, roles = tiny("llama", num_hidden_layers=3), {"marked": ((2, 5),)}
    how: dict[str, Any] = dict(
        max_new_tokens=8, num_beams=4, num_return_sequences=4, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
    )  # fmt: skip
    with attach(model, method, roles=roles) as run:
        found = run.generate(input_ids=IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **how)
        for text, score in zip(found.sequences, found.sequences_scores, strict=True):
            out, total = run(input_ids=text[None, :12], use_cache=True), torch.zeros(())
            for token in text[12:]:
                total = total + out.logits[0, -1].log_softmax(-1)[token]
                out = run(input_ids=token.view(1, 1), use_cache=True, **{CACHE: cache_of(out)})
            assert close_model(score, total)


@torch.no_grad()
def test_a_cropped_text_goes_on_as_if_it_had_ended_there() -> None:
    """As assisted decoding does: some tokens are tried and taken back."""
    model, roles = tiny("llama", num_hidden_layers=3), {"marked": ((2, 5),)}
    with attach(model, VAR.example(), roles=roles) as run:
        cache = run(input_ids=IDS[:, :8])[CACHE]
        want = run(input_ids=IDS[:, 8:], **{CACHE: copy.deepcopy(cache)}).logits
        run(input_ids=torch.full((2, 3), 90), **{CACHE: cache})
        cache.crop(-3)
        assert close_model(run(input_ids=IDS[:, 8:], **{CACHE: cache}).logits, want)
        assert notes_in(cache)["sinks"].shape == IDS.shape


def test_what_was_made_of_tokens_that_are_cropped_is_of_none() -> None:
    assert Until(torch.tensor([3, 4, 5, 0])).crop(4).x.tolist() == [3, 4, -1, 0]


def test_a_layer_of_the_cache_takes_what_it_has_held_from_its_first_token_on() -> None:
    settled: list[Shelf] = []
    shelf = Shelf(settled.append)
    assert not shelf.takes(1, "latent", 3)  # so many tokens are held as keys and values
    assert (settled, shelf.instead, shelf.served) == ([], {}, None)
    assert shelf.takes(1, "latent", 0)
    assert (settled, shelf.instead, shelf.served) == ([shelf], {1: "latent"}, 1)
    assert shelf.takes(1, "latent", 3)
    assert not shelf.takes(1, "codes", 3)
    assert shelf.takes(2, "codes", 0)
    assert (len(settled), shelf.instead, shelf.served) == (1, {1: "latent", 2: "codes"}, 2)
