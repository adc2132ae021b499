"""What models hand to their attention, one kind a test: padding, windows, packing, prefixes, caches, beams, maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from benchmarks.coverage import tiny as zoo
from benchmarks.coverage.probe import Through
from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.call import CachedKV, Call
from heedful.core.errors import RefusedModel, SiteError, UnknownArgument
from heedful.core.mask import Mask, Window
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.tiny import tiny, tiny_inputs

from .samples import PAPER, Forget, Keep, Scale, Zero

# half of these tests are about changing nothing
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing", "ignore::UserWarning:transformers")

IDS = torch.arange(3, 27).view(2, 12)
DECODERS = ("llama", "gpt2", "gemma2", "mistral", "gpt_oss", "qwen3")


class Positions(Method):
    """Changes nothing, and remembers every call."""

    paper = PAPER

    @at(Site.MASK)
    def look(self, mask: Mask, call: Call) -> Mask:
        call.state.run.setdefault("calls", []).append(call)
        return mask


class Recent(Method):
    """The mask that a cache of the last `size` entries amounts to."""

    paper = PAPER
    size: int = 4

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & Window(self.size)


class Last(Method):
    """A cache of the last entries."""

    paper = PAPER
    size: int = 4

    @at(Site.CACHE)
    def drop(self, entries: CachedKV, call: Call) -> Tensor:
        newest = entries.positions.index.amax(-1, keepdim=True)
        return (newest - entries.positions.index < self.size) & entries.is_filled


class Nudge(Method):
    """Moves the block's input."""

    paper = PAPER

    @at(Site.HIDDEN)
    def move(self, hidden: Tensor, call: Call) -> Tensor:
        return hidden + 1


class Average(Method):
    """Every query gets the mean of all values: a mechanism without a map."""

    paper = PAPER

    @at(Site.MIX)
    def mean(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, _, v = qkv
        return call.spread(v).mean(-2, keepdim=True).expand(*q.shape[:3], v.shape[-1])


def eager(kind: str, **settings: Any) -> Any:
    return tiny(kind, attn_implementation="eager", **settings)


def calls(run: Any) -> list[Call]:
    return run.state._of_run[0, 0]["calls"]


@torch.no_grad()
def through(model: nn.Module, what: Method | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The logits of the model and those under a stack that changes nothing."""
    plain = model(**inputs)
    with attach(model, what or Through(), backend="reference") as run:
        found = run(**inputs)
    return plain[0], found[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
def test_padding_and_windows(kind: str, side: str) -> None:
    text = torch.ones_like(IDS)
    text[1, slice(0, 5) if side == "left" else slice(7, None)] = 0
    plain, found = through(eager(kind), input_ids=IDS, attention_mask=text)
    # a padding query before all text may see nothing: zeros here, a mean of all values in eager attention
    assert torch.equal(plain[text == 1], found[text == 1])


def test_positions_do_not_count_padding() -> None:
    model, text = eager("llama"), torch.ones_like(IDS)
    text[1, :5] = 0
    with attach(model, Positions()) as run, torch.no_grad():
        run(input_ids=IDS, attention_mask=text)
        call = calls(run)[0]
    assert call.q_pos[1, 0].tolist() == list(range(-5, 7))
    assert call.is_text[1, 0].tolist() == [False] * 5 + [True] * 7


def test_packed_texts() -> None:
    model = eager("llama")
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    inputs = dict(input_ids=IDS[:1], position_ids=position, use_cache=False)
    plain, found = through(model, **inputs)
    assert torch.equal(plain, found)
    with torch.no_grad():
        assert not close_model(plain, model(input_ids=IDS[:1], use_cache=False)[0])
        second = model(input_ids=IDS[:1, 5:], use_cache=False)[0]
    assert close_model(found[:, 5:], second)
    with attach(model, Positions()) as run, torch.no_grad():
        run(**inputs)
        assert calls(run)[0].q_pos[0, 0].tolist() == position[0].tolist()


def test_prefixes_that_see_both_ways() -> None:
    one = zoo.build("PaliGemmaForConditionalGeneration")
    one.model.set_attn_implementation("eager")
    plain = zoo.output_tensors(one.forward())
    with attach(one.model, Positions(), only="model.language_model", backend="reference") as run:
        found = zoo.output_tensors(one.forward())
        call = calls(run)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    whole = call.tile(slice(0, len(call.queries)), slice(0, len(call.keys)))
    keep = call.mask.keeps(whole.pairs)
    assert keep is not None
    assert bool(keep.triu(1).any()), "some token sees a later one"


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_generating_under_nothing_is_generating(kind: str, cache: str | None) -> None:
    model, text = eager(kind), torch.ones_like(IDS)
    text[1, :5] = 0
    how: dict[str, Any] = dict(
        input_ids=IDS, attention_mask=text, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, cache_implementation=cache, disable_compile=True,
    )  # fmt: skip
    plain = model.generate(**how)
    with attach(model, Through(), backend="reference") as run:
        found = run.generate(**how)
    assert torch.equal(plain.sequences, found.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, found.logits, strict=True))


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_encoder_decoders_generate(kind: str) -> None:
    model = eager(kind)
    inputs = {k: v for k, v in tiny_inputs(model).items() if not k.startswith("decoder")}
    how: dict[str, Any] = dict(
        max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None,
        pad_token_id=0, **({} if kind == "whisper" else {"attention_mask": torch.ones_like(inputs["input_ids"])}),
    )  # fmt: skip
    plain = model.generate(**inputs, **how)
    with attach(model, Positions(), backend="reference") as run:
        found = run.generate(**inputs, **how)
        crossed = [c for (_, _), m in run.state._of_run.items() for c in m["calls"] if c.cross]
    assert torch.equal(plain.sequences, found.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, found.logits, strict=True))
    assert len(crossed) == 2 * 5, "two layers, five tokens"


def test_one_part_of_a_model_of_two() -> None:
    model = eager("llava")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        plain = model(**inputs)[0]
    for part in ("model.language_model", "model.vision_tower"):
        with attach(model, Zero().on(heads=0), only=part) as run, torch.no_grad():
            assert all(name.startswith(part) for name in run.layer_names)
            assert not close_model(run(**inputs)[0], plain)
    with attach(model, Through(), only="model.vision_tower", backend="reference") as run, torch.no_grad():
        assert torch.equal(run(**inputs)[0], plain)


def test_a_cache_that_cannot_shrink_is_refused() -> None:
    model = eager("llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with attach(model, Forget()) as run, pytest.raises(RefusedModel, match="StaticLayer"), torch.no_grad():
        run(input_ids=IDS, **{CACHE: cache})
    with attach(eager("mistral"), Forget()) as run, pytest.raises(RefusedModel, match="SlidingWindow"):
        run.generate(IDS, max_new_tokens=2, do_sample=False)


def test_a_cache_that_holds_no_keys_is_refused() -> None:
    one = zoo.build("DeepseekV3ForCausalLM")
    with attach(one.model, Forget()) as run, pytest.raises(RefusedModel, match="compressed ones or none"):
        run.generate(one.inputs["input_ids"], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_short_cache_is_a_window(beams: int) -> None:
    model, text = eager("llama"), torch.ones_like(IDS)
    text[1, :5] = 0
    how: dict[str, Any] = dict(
        input_ids=IDS, attention_mask=text, max_new_tokens=6, num_beams=beams, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    with attach(model, Last(4)) as run:
        found = run.generate(**how)
        held, seen = run.activity().kept[0]
    with attach(model, Recent(5).when("decode")) as run:  # the four kept, and the new one
        wanted = run.generate(**how)
    assert held < seen
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(close_model(a, b) for a, b in zip(found.scores, wanted.scores, strict=True))


@pytest.mark.parametrize("what", [Scale(), Nudge(), Keep(), Zero().on(heads=1)], ids=repr)
def test_patterns_that_the_caller_wants(what: Method) -> None:
    """Never silently none: transformers' own kernels and our tiles have no pattern to give."""
    text = torch.ones_like(IDS)
    text[1, 7:] = 0
    inputs = dict(input_ids=IDS, attention_mask=text, output_attentions=True)
    found = {}
    for implementation in ("eager", "sdpa"):
        with attach(tiny("llama", attn_implementation=implementation), what) as run, torch.no_grad():
            found[implementation] = run(**inputs).attentions
    assert len(found["sdpa"]) == 2
    assert all(close_model(a, b) for a, b in zip(found["sdpa"], found["eager"], strict=True))
    with torch.no_grad():
        wanted = eager("llama")(**inputs).attentions[0].clone()
    if isinstance(what, Nudge):
        assert not close_model(found["sdpa"][0], wanted)
        return
    if not isinstance(what, Scale | Keep):
        wanted[:, 1] = 0
    assert close_model(found["sdpa"][0], wanted)


def test_patterns_of_a_mechanism_without_any_are_refused() -> None:
    with attach(eager("llama"), Average()) as run, pytest.raises(SiteError, match="computes no pattern"):
        run(input_ids=IDS, output_attentions=True)


def test_unknown_tensors_are_refused_and_passing_ones_are_not() -> None:
    model = eager("llama")
    with attach(model, Through()) as run, torch.no_grad():
        run(input_ids=IDS, image_sizes=torch.ones(2, 2))  # comes along, and llama's own attention ignores it
    module = model.model.layers[0].self_attn

    class Biased(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, secret=torch.ones(1), **kwargs)

    module.__class__ = Biased
    with attach(model, Through()) as run, pytest.raises(UnknownArgument, match="tensor 'secret'"), torch.no_grad():
        run(input_ids=IDS)


def test_keys_that_an_indexer_chose_by_block() -> None:
    kind = zoo.build("MiniMaxM3VLForCausalLM").model
    config = copy.deepcopy(kind.config)
    config.layer_types = ["minimax_m3_sparse"] * config.num_hidden_layers
    torch.manual_seed(0)
    model = type(kind)(config).eval()
    model.set_attn_implementation("eager")
    if not any(getattr(m, "indexer", None) is not None for m in model.modules()):
        pytest.fail(f"no indexer in {config.layer_types}")
    ids = torch.randint(3, 100, (2, 40))
    plain, found = through(model, input_ids=ids)
    assert torch.equal(plain, found)


def test_dynamic_caches_of_the_caller() -> None:
    model, cache, twin = eager("llama"), DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, **{CACHE: twin})
        plain = model(input_ids=IDS[:, :3], **{CACHE: twin})[0]
        with attach(model, Through(), backend="reference") as run:
            run(input_ids=IDS, **{CACHE: cache})
            found = run(input_ids=IDS[:, :3], **{CACHE: cache})[0]
    assert torch.equal(plain, found)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_that_works_with_its_mask_gets_the_one_it_had(implementation: str) -> None:
    """Additive under eager attention and boolean under sdpa: this encoder inverts it, which is not the same."""
    one = zoo.build("NemotronAsrStreamingEncoder")
    one.model.set_attn_implementation(implementation)
    plain = zoo.output_tensors(one.forward())
    with attach(one.model, Through(), backend="reference"):
        found = zoo.output_tensors(one.forward())
    assert all(close_model(a, b) for a, b in zip(found, plain, strict=True))


def test_weights_that_a_model_hands_on_unasked_are_still_there() -> None:
    """Kosmos 2.5's projection gives those of its eager attention, whatever output_attentions says."""
    one = zoo.build("Kosmos2_5ForConditionalGeneration")
    one.model.set_attn_implementation("eager")

    def weights() -> Tensor:
        out = one.forward()
        return (getattr(out, "image_outputs", None) or out).projection_attentions

    plain = weights()
    with attach(one.model, Through(), backend="reference"):
        assert close_model(weights(), plain)
    with attach(one.model, Zero()):
        assert not weights().any()


def test_parts_of_a_model_with_unlike_implementations() -> None:
    model = eager("llava")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = [model.config.get_text_config()._attn_implementation, model.config.vision_config._attn_implementation]
    inputs = tiny_inputs(model)
    with torch.no_grad():
        plain = model(**inputs)[0]
        with attach(model, Through().when("decode")) as run:
            assert torch.equal(run(**inputs)[0], plain)
            assert set(run.activity().backends.values()) == {"the model's own (eager)", "the model's own (sdpa)"}
    assert before == [
        model.config.get_text_config()._attn_implementation,
        model.config.vision_config._attn_implementation,
    ]
    assert before == ["eager", "sdpa"]
