"""Queries and keys from before the rotary embedding, for methods with positions of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.adapters.replacing import shares_keys
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import DefinitionError, FieldError, NotEntered, RefusedModel, SiteError
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.methods import MassiveQK

from .samples import PAPER

IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(0))
QKV = tuple[Tensor, Tensor, Tensor]


def attended(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Attention that knows nothing of places: softmax(q k scale) over the text so far."""
    keep = call.tile(slice(0, q.shape[2]), slice(0, k.shape[2])).pairs
    scores = (q @ call.spread(k).mT) * call.scale
    kept = call.mask.keeps(keep)
    if kept is not None:
        scores = scores.masked_fill(~kept, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ call.spread(v)


class Placeless(Method):
    """Attends without places, and keeps what it was handed."""

    paper = PAPER

    @at(Site.MIX, before_rotary=True)
    def attend(self, qkv: QKV, call: Call) -> Tensor:
        SEEN.append(qkv)
        return attended(*qkv, call)


class PlacelessBlock(Method):
    """The same for a whole block; its own projection is that of the heads."""

    paper = PAPER

    @at(Site.BLOCK, before_rotary=True)
    def attend(self, x: Tensor, call: Call) -> Tensor:
        assert call.query is not None
        assert call.key is not None
        assert call.value is not None
        SEEN.append((call.query, call.key, call.value))
        return attended(call.query, call.key, call.value, call).transpose(1, 2).flatten(2)


SEEN: list[QKV] = []
BOTH = (Placeless(), PlacelessBlock())


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    for kept in (SEEN, HIDDEN, PROJECTED, TURNED):
        kept.clear()


def projected(model: Any, hidden: Tensor, layer: int) -> QKV:
    part = model.model.layers[layer].self_attn
    return tuple(  # type: ignore[return-value]
        p(hidden).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (part.q_proj, part.k_proj, part.v_proj)
    )


class Inputs(Method):
    paper = PAPER

    @reads(Site.HIDDEN)
    def look(self, x: Tensor, call: Call) -> None:
        HIDDEN.append(x)


HIDDEN: list[Tensor] = []


@pytest.mark.parametrize("method", BOTH, ids=repr)
@torch.no_grad()
def test_they_are_what_the_projections_give_bit_for_bit(method: Method) -> None:
    HIDDEN.clear()
    model = models.tiny("llama")
    with attach(model, method | Inputs()) as run:
        run(input_ids=IDS)
    for layer, (given, x) in enumerate(zip(SEEN, HIDDEN, strict=True)):
        for found, want in zip(given, projected(model, x, layer), strict=True):
            assert torch.equal(found, want)


class Rotates(Method):
    """Keeps queries and keys, and those of the layer's projections as `call.rotate` has them."""

    paper = PAPER

    @reads(Site.HIDDEN)
    def look(self, x: Tensor, call: Call) -> None:
        HIDDEN.append(x)

    @reads(Site.QUERY)
    def queries(self, x: Tensor, call: Call) -> None:
        self._rotated(x, 0, call)

    @reads(Site.KEY)
    def keys(self, x: Tensor, call: Call) -> None:
        self._rotated(x, 1, call)

    def _rotated(self, x: Tensor, place: int, call: Call) -> None:
        mine = PROJECTED[0](HIDDEN[-1])[place] if PROJECTED else x
        TURNED.append((x, mine if call.rotate is None else call.rotate(mine)))


PROJECTED: list[Callable[[Tensor], tuple[Tensor, ...]]] = []
TURNED: list[tuple[Tensor, Tensor]] = []


def projection(model: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What a one-layer model's projections make of hidden states: queries and keys `[b h n d]`."""
    for part in model.modules():
        if hasattr(part, "query_key_value"):
            return lambda x: part.query_key_value(x).unflatten(-1, (4, -1)).transpose(1, 2).chunk(3, -1)
        if hasattr(part, "q_proj"):
            return lambda x: tuple(p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (part.q_proj, part.k_proj))
    raise LookupError(type(model).__name__)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("llama", 0), ("gpt_neox", 0), *((kind, i) for kind in ("smollm3", "cohere2", "llama4_text") for i in (0, 1))],
)
@torch.no_grad()
def test_rotating_what_is_projected_gives_what_the_model_attends_with(kind: str, layer: int) -> None:
    """Some layers of SmolLM3 and Cohere2 are handed angles and skip them; GPT-NeoX rotates a part of each head."""
    model = models.tiny("llama") if kind == "llama" else configured(kind, layer)
    PROJECTED.append(projection(model))
    with attach(model, Rotates().on(layers=0)) as run:
        if kind == "llama4_text" and layer:
            with pytest.raises(RefusedModel, match="in a way of its own"):
                run(input_ids=IDS)
            return
        run(input_ids=IDS)
    for want, mine in TURNED:
        assert close(mine, want)


@pytest.mark.parametrize("kind", ["gptj", "phi"])
@torch.no_grad()
def test_a_rotation_that_nobody_else_can_follow_is_refused(kind: str) -> None:
    with attach(configured(kind), Rotates()) as run, pytest.raises(RefusedModel, match="in a way of its own"):
        run(input_ids=IDS)
    with attach(configured(kind), MassiveQK()) as run:
        run(input_ids=IDS)
    assert run[MassiveQK()] is not None


@pytest.mark.parametrize("method", BOTH, ids=repr)
@torch.no_grad()
def test_a_model_without_a_rotary_embedding_hands_its_own(method: Method) -> None:
    """And its cache is like any other."""
    model = models.tiny("gpt2")

    class Plain(Method):
        paper = PAPER

        @at(Site.MIX)
        def attend(self, qkv: QKV, call: Call) -> Tensor:
            SEEN.append(qkv)
            return attended(*qkv, call)

    for each in (method, Plain()):
        with attach(model, each.on(layers=0)) as run:
            out = run(input_ids=IDS, use_cache=True)
    assert all(torch.equal(*pair) for pair in zip(SEEN[0], SEEN[1], strict=True))
    assert model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache_of(out)}).logits.isfinite().all()


@pytest.mark.parametrize(
    ("method", "kind"),
    [(Placeless(), kind) for kind in ("llama", "mqa", "odd_head_dim", "qwen3", "gpt2")]
    + [(PlacelessBlock(), kind) for kind in ("llama", "mqa", "gpt2")],
)
@torch.no_grad()
def test_step_by_step_with_padding_is_the_whole_text_at_once(method: Method, kind: str) -> None:
    model = models.tiny(kind)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with attach(model, method) as run:
        whole = run(input_ids=IDS, attention_mask=mask, position_ids=place).logits
        cache, parts = None, []
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 10), (10, 11)):
            out = run(
                input_ids=IDS[:, start:stop], attention_mask=mask[:, :stop], position_ids=place[:, start:stop],
                use_cache=True, **{CACHE: cache},
            )  # fmt: skip
            cache = cache_of(out)
            parts.append(out.logits)
        alone = run(input_ids=IDS[:1, 4:]).logits
    assert close_model(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])
    assert close_model(whole[0, 4:], alone[0])


@torch.no_grad()
def test_places_are_gone_with_it() -> None:
    """The order of earlier tokens changes nothing: neither projections nor the first layer's mixture know it."""
    model = models.tiny("llama", num_hidden_layers=1)
    other = torch.cat([IDS[:, :-1].flip(-1), IDS[:, -1:]], -1)
    with attach(model, Placeless()) as run:
        found = [run(input_ids=ids).logits[:, -1] for ids in (IDS, other)]
        texts = run.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2)
    assert close_model(*found)
    assert texts.shape == (2, 15)


@torch.no_grad()
def test_a_cache_of_such_keys_is_nobody_elses() -> None:
    model = models.tiny("llama")
    step = {"input_ids": IDS[:, :1], "use_cache": True}
    with attach(model, Placeless().on(layers=1)) as run:
        cache = cache_of(run(input_ids=IDS, use_cache=True))
        run(**step, **{CACHE: cache})
        with run.paused(), pytest.raises(RefusedModel, match="holds keys from before the rotary embedding"):
            model(**step, **{CACHE: cache})
    plain = cache_of(model(input_ids=IDS, use_cache=True))
    with attach(model, Placeless()) as run, pytest.raises(SiteError, match="read the text anew"):
        run(**step, **{CACHE: plain})
    cache.reset()
    model(**step, **{CACHE: cache})


@torch.no_grad()
def test_a_call_that_failed_opens_such_a_cache_to_nobody() -> None:
    model = models.tiny("llama")
    step = {"input_ids": IDS[:, :1], "use_cache": True}
    with attach(model, Placeless().on(layers=0)) as run:
        cache = cache_of(run(input_ids=IDS, use_cache=True))
        handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(**step, **{CACHE: cache})
        handle.remove()
    with pytest.raises(RefusedModel, match="holds keys from before the rotary embedding"):
        model(**step, **{CACHE: cache})


@torch.no_grad()
def test_attention_that_gives_nothing_and_came_by_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama")
    with attach(model, Placeless()) as run:
        monkeypatch.setattr(model.model.layers[0].self_attn, "forward", lambda *_, **__: None)
        with pytest.raises(NotEntered, match="did not pass through heedful"):
            run(input_ids=IDS)


class Sometimes(Placeless):
    def idle(self, call: Call) -> bool:
        return len(call.queries) == 1


@torch.no_grad()
def test_what_acts_in_some_calls_alone_is_refused() -> None:
    with pytest.raises(FieldError, match="a cache cannot hold both"):
        Placeless().when("prefill")
    with attach(models.tiny("llama"), Sometimes()) as run:
        cache = cache_of(run(input_ids=IDS, use_cache=True))
        with pytest.raises(RefusedModel, match="go on under the stack that filled it"):
            run(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})


def test_only_what_replaces_the_map_may_ask() -> None:
    with pytest.raises(DefinitionError, match="only MIX and BLOCK"):
        at(Site.SCORES, before_rotary=True)


def configured(kind: str, variant: int = 1) -> Any:
    """Models whose attention is handed its angles in a way of its own, makes them itself, or skips them."""
    import transformers

    sizes: dict[str, Any] = dict(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    of = {
        "gptj": dict(vocab_size=128, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2),
        "esm": sizes | dict(position_embedding_type="rotary", pad_token_id=1, mask_token_id=2),
        "llama4_text": sizes | dict(head_dim=8, num_key_value_heads=2, num_local_experts=1, num_experts_per_tok=1)
        | dict(no_rope_layers=[variant], layer_types=["full_attention"], moe_layers=[], pad_token_id=0),
        "smollm3": sizes | dict(num_key_value_heads=2, no_rope_layers=[variant], pad_token_id=0),
        "cohere2": sizes | dict(num_key_value_heads=2, layer_types=[("full_attention", "sliding_attention")[variant]]),
        "gpt_neox": sizes,
        "phi": sizes,
        "moshi": sizes | dict(num_key_value_heads=4, head_dim=8, audio_vocab_size=16, num_codebooks=1),
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **of[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.MODEL_MAPPING[type(config)](config).eval()


@pytest.mark.parametrize("kind", ["gptj", "esm", "llama4_text"])
@torch.no_grad()
def test_angles_in_whatever_form_are_left_out(kind: str) -> None:
    """The same token at every place gives the same queries and keys."""
    with attach(configured(kind), Placeless().on(layers=0)) as run:
        run(input_ids=torch.full((1, 6), 7), attention_mask=torch.ones(1, 6, dtype=torch.long))
    for x in SEEN[0]:
        assert close(x, x[:, :, :1].expand_as(x))
        assert bool(x.any())


@torch.no_grad()
def test_a_layer_that_rotates_by_itself_is_refused() -> None:
    with attach(configured("moshi"), Placeless()) as run, pytest.raises(RefusedModel, match="rotates queries and keys"):
        run(input_ids=IDS)


@torch.no_grad()
def test_a_layer_whose_keys_others_read_is_refused() -> None:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAttention

    assert shares_keys(object.__new__(Gemma3nTextAttention))
    assert not shares_keys(models.tiny("llama").model.layers[0].self_attn)
