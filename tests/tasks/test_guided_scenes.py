"""Scenes drawn under decoding steps that guide: what is combined, told, left as it was, and refused."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality.erasing import START, Erased
from claims._pictures import denoiser
from heedful import attach, attached, models
from heedful.bench.answer import answer
from heedful.bench.asking import require_fit
from heedful.bench.compare import compare
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt, Reader
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Sum
from heedful.drawing import Guided, begin, drawn
from heedful.methods import AttentiveEraser, LargePiG, SoftPAG, TempScale
from heedful.models.small_denoiser import HEADS
from heedful.shown import Drawing
from heedful.tasks.scenes import TwoThings
from heedful.tasks.task import Item
from heedful.text_models import text_model

STEPS = 4
SOFT = SoftPAG(heads=((0, 1), (2, 0), (2, 3)), u=0.7, w=2.0)
PAPER = Paper("", "A Step for a Test", "Nobody", 2026, "2601.00001")


@pytest.fixture(scope="module")
def item() -> Item:
    small = models.denoiser()
    return TwoThings(steps=STEPS).on(denoiser(), small.tokenizer).item(small.tokenizer, 0, 0)


def draws_of(item: Item) -> Drawing:
    assert item.shown.draws is not None
    return item.shown.draws


def made_under(step: Decode, item: Item, model: nn.Module | None = None, beside: Stack | None = None) -> Tensor:
    model, draws = model or denoiser(), draws_of(item)
    guided = Guided(model, step, beside or Stack())
    try:
        begin(guided, item.prompt, {**item.prompt.roles, **draws.roles})
        return drawn(model, guided, None, draws, draws.noise)
    finally:
        guided.close()


@torch.no_grad()
def by_hand(flow: Any, item: Item) -> Tensor:
    """Noise, and in each step what is predicted taken from it."""
    x = draws_of(item).noise
    for number in range(STEPS):
        x = x - flow(x, torch.full((1,), 1 - number / STEPS), number) / STEPS
    return x


def context_of(item: Item) -> Tensor:
    return denoiser().read(torch.tensor([item.prompt.tokens]))


def test_what_two_runs_predict_is_combined_in_each_step(item: Item) -> None:
    model, context = denoiser(), context_of(item)
    weak = SOFT.variants(item.prompt)["weak"][1]
    with attach(model, weak, inputs={"noised": draws_of(item).noise, "t": torch.ones(1), "context": context}) as run:

        def flow(x: Tensor, t: Tensor, number: int) -> Tensor:
            with run.paused():
                strong = model(noised=x, t=t, context=context)
            return strong + 2.0 * (strong - run(noised=x, t=t, context=context))

        want = by_hand(flow, item)
    assert torch.equal(made_under(SOFT, item), want)
    assert not close_model(want, made_under(replace(SOFT, w=0.0), item))


def predicted(x: Tensor, t: Tensor, context: Tensor, weak: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The denoiser written out, with maps of some heads of a block's self-attention on their way to identity."""
    model = denoiser()
    turns = 1000 * t[:, None] * torch.exp(torch.arange(32) * (-math.log(10000) / 32))
    time = model.time(torch.cat([turns.sin(), turns.cos()], -1)).unflatten(-1, (6, 64))
    h = model.patches(torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)) + model.position

    def attend(module: Any, seen: Tensor, keys: Tensor, towards: tuple[int, ...]) -> Tensor:
        q, (k, v) = module.q(seen), module.kv(keys).chunk(2, -1)
        each = []
        for head in range(HEADS):
            part = slice(16 * head, 16 * head + 16)
            a = (q[..., part] @ k[..., part].mT / 4).softmax(-1)
            if head in towards:
                a = 0.3 * a + 0.7 * torch.eye(a.shape[-1])
            each.append(a @ v[..., part])
        return module.out(torch.cat(each, -1))  # type: ignore[no-any-return]

    for number, block in enumerate(model.blocks):
        shift, scale, gate, shift_2, scale_2, gate_2 = (block.table + time).unbind(1)
        seen = block.norm(h) * (1 + scale[:, None]) + shift[:, None]
        h = h + gate[:, None] * attend(block.attn, seen, seen, weak.get(number, ()))
        h = h + attend(block.cross, block.norm(h), context, ())
        h = h + gate_2[:, None] * block.mlp(block.norm(h) * (1 + scale_2[:, None]) + shift_2[:, None])
    found = model.out(model.norm(h)).transpose(1, 2).unflatten(-1, (8, 8))
    return torch.nn.functional.pixel_shuffle(found, 2)


def test_it_is_softpag_written_out_without_heedful(item: Item) -> None:
    context = context_of(item)

    def flow(x: Tensor, t: Tensor, number: int) -> Tensor:
        strong, weak = predicted(x, t, context, {}), predicted(x, t, context, {0: (1,), 1: (0, 3)})
        return strong + 2.0 * (strong - weak)

    assert close_model(made_under(SOFT, item), by_hand(flow, item))


def test_rows_of_a_batch_are_each_combined_however_often_the_model_is_called(item: Item) -> None:
    """A step that guides by words too, in one call for both rows, and looks a second time as Heun does."""
    model, context, none = denoiser(), context_of(item), denoiser().read(torch.zeros(1, 5, dtype=torch.long))

    def step(predict: Any, x: Tensor, number: int) -> Tensor:
        def flow(x: Tensor, t: float) -> Tensor:
            at = torch.full((2,), t)
            without, with_words = predict(noised=torch.cat([x, x]), t=at, context=torch.cat([none, context]))
            return without[None] + 1.5 * (with_words - without)[None]

        now = 1 - number / STEPS
        first = flow(x, now)
        return x - (first + flow(x - first / STEPS, now - 1 / STEPS)) / 2 / STEPS

    other = replace(item, shown=replace(item.shown, draws=replace(draws_of(item), step=step)))
    given = {"noised": draws_of(item).noise, "t": torch.ones(1), "context": context}
    with attach(model, SOFT.variants(item.prompt)["weak"][1], inputs=given) as run, torch.no_grad():

        def predict(**given: Tensor) -> Tensor:
            with run.paused():
                strong: Tensor = model(**given)
            return strong + 2.0 * (strong - run(**given))

        x = draws_of(item).noise
        for number in range(STEPS):
            x = step(predict, x, number)
    assert torch.equal(made_under(SOFT, other), x)


class Wrapped(nn.Module):
    """The denoiser, what it predicts given as a pipeline's models give it."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.inner, self.form = denoiser(), form

    def forward(self, **given: Tensor) -> Any:
        return self.form(self.inner(**given))


def test_what_models_of_diffusers_give_is_combined_as_it_is(item: Item) -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    def asked(form: Any, out: Any) -> Tensor:
        def step(model: Any, x: Tensor, number: int) -> Tensor:
            t = torch.full((1,), 1 - number / STEPS)
            return x - out(model(noised=x, t=t, context=context_of(item))) / STEPS

        other = replace(item, shown=replace(item.shown, draws=replace(draws_of(item), step=step)))
        return made_under(SOFT, other, Wrapped(form))

    want = made_under(SOFT, item)
    assert torch.equal(asked(lambda x: Transformer2DModelOutput(sample=x), lambda found: found.sample), want)
    assert torch.equal(asked(lambda x: (x,), lambda found: found[0]), want)
    with pytest.raises(SiteError, match="Wrapped gives 2 tensors, and a single prediction can be combined"):
        asked(lambda x: (x, x), lambda found: found[0])
    kinds = []
    asked(lambda x: x.bfloat16(), lambda found: (kinds.append(found.dtype), found)[1])  # type: ignore[func-returns-value]
    assert kinds == [torch.bfloat16] * STEPS


def test_neutral_settings_draw_as_the_model_does_and_others_are_told_as_active(item: Item) -> None:
    plain = drawn(denoiser(), None, None, draws_of(item), draws_of(item).noise)
    assert torch.equal(made_under(SoftPAG.neutral(), item), plain)
    speaker: Any
    with text_model(denoiser(), SoftPAG(u=0.0), item.shown) as speaker:
        answer(speaker, item)
        assert not speaker.active
    with text_model(denoiser(), SOFT, item.shown) as speaker:
        first, again = answer(speaker, item), answer(speaker, item)
        assert speaker.active
        (run,) = filter(None, speaker._guided.runs.values())
    assert run.closed
    assert torch.equal(first.options[0], again.options[0])
    with text_model(denoiser(), None, item.shown) as speaker:
        assert answer(speaker, item).means != first.means
    assert attached(denoiser()) is None


def test_a_model_in_half_precision_draws_the_same(item: Item) -> None:
    half = copy.deepcopy(denoiser()).bfloat16()
    for what in (None, SOFT, TempScale(0.5)):
        with text_model(half, what, item.shown) as speaker, text_model(denoiser(), what, item.shown) as other:
            assert answer(speaker, item).greedy == answer(other, item).greedy
    assert TwoThings().on(half, models.denoiser().tokenizer).judged is not None


def test_the_model_is_left_as_it_was_after_an_error_too(item: Item) -> None:
    def fails(model: Any, x: Tensor, number: int) -> Tensor:
        raise RuntimeError("too few")

    other = replace(item, shown=replace(item.shown, draws=replace(draws_of(item), step=fails)))
    with pytest.raises(RuntimeError, match="too few"):
        made_under(SOFT, other)
    assert attached(denoiser()) is None
    assert not denoiser()._forward_hooks


class Counting(Method):
    """How many forwards it has been shown."""

    paper = PAPER

    @reads(Site.PATTERN)
    def count(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of(weights.new_ones(1))


class Told(Decode):
    """Keeps what it is told."""

    paper = PAPER
    denoises = True

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        return {"one": (prompt, Stack()), "other": (prompt, Stack((Counting(),)))}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        LOG.append(read)
        return logits["one"]


LOG: list[Read] = []


@pytest.fixture
def log() -> Iterator[list[Read]]:
    LOG.clear()
    yield LOG
    LOG.clear()


def test_readers_of_variants_tell_of_each_forward_and_those_beside_of_the_picture(item: Item, log: list[Read]) -> None:
    beside = Counting().on(layers=[0])
    guided = Guided(denoiser(), Told(), Stack((beside,)))
    begin(guided, item.prompt, item.prompt.roles)
    drawn(denoiser(), guided, None, draws_of(item), draws_of(item).noise)
    assert len(log) == STEPS
    for read in log:
        assert read["one"] == {}
        assert [float(stat.value) for stat in read["other"][Counting()].values()] == [1.0] * 6
    assert guided.first is not None
    assert float(guided.first[beside][0].value) == STEPS
    begin(guided, item.prompt, item.prompt.roles)
    assert not guided.first.state.statistics, "of the picture before nothing is told"
    guided.close()


class Other(Told):
    """Wants a run of another prompt."""

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        return {"one": (prompt, Stack()), "none": (Prompt((0,)), Stack())}


class Reading(Told):
    """Reads the prompt first."""

    def ready(self, prompt: Prompt, read: Reader) -> Decode:
        read(prompt, Counting())
        return self


class Halved(Told):
    """Returns something else than what is predicted."""

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return logits["one"][..., :8]


@pytest.mark.parametrize(
    ("step", "kind", "rule"),
    [
        (LargePiG("subjects"), FieldError, "combines next-token logits, and a scene has none; for example.*SoftPAG"),
        (Other(), FieldError, "must be runs of the prompt that is drawn"),
        (Reading(), FieldError, "reads the prompt before it acts, and a diffusion model reads none by itself"),
        (Halved(), SiteError, r"combine must return what is predicted, \(1, 3, 16, 16\), got \(1, 3, 16, 8\)"),
    ],
)
def test_steps_that_cannot_guide_say_why(item: Item, step: Decode, kind: type[Exception], rule: str) -> None:
    with pytest.raises(kind, match=rule):
        made_under(step, item)


def test_a_step_that_calls_a_part_of_the_model_is_not_guided_in_silence(item: Item) -> None:
    def step(model: Any, x: Tensor, number: int) -> Tensor:
        return x - model.inner(noised=x, t=torch.ones(1), context=context_of(item)) / STEPS

    other = replace(item, shown=replace(item.shown, draws=replace(draws_of(item), step=step)))
    with pytest.raises(SiteError, match="Wrapped itself was not called in step 0, so nothing was combined"):
        made_under(SOFT, other, Wrapped(lambda x: x))


def test_an_eraser_wants_places_of_the_picture(item: Item) -> None:
    rule = r"role = 'marked': names places of the picture, and these scenes mark none, as Scene\(..., roles=\{'marked'"
    with pytest.raises(FieldError, match=rule):
        require_fit(AttentiveEraser(), item)
    with pytest.raises(FieldError, match=r"role = 'subjects': names places of the picture, and these scenes mark none"):
        require_fit(AttentiveEraser(role="subjects"), item)  # those are words
    small = models.denoiser()
    erased = Erased().on(denoiser(), small.tokenizer).item(small.tokenizer, 0, 0)
    require_fit(AttentiveEraser(), erased)
    with pytest.raises(FieldError, match="these scenes mark 'marked', 'other'; for example role='marked'"):
        require_fit(AttentiveEraser(role="subjects"), erased)


@torch.no_grad()
def test_an_eraser_acts_on_the_marked_places_and_in_early_steps() -> None:
    task, method, small = Erased(steps=STEPS), AttentiveEraser(s=2.0, early=0.5), models.denoiser()
    item = task.on(denoiser(), small.tokenizer).item(small.tokenizer, 3, 0)
    draws = draws_of(item)
    scene: Any = task.scene(small.tokenizer, task.draw(0, 3))
    assert torch.equal(scene.noise, draws.noise)
    marked = [place for place, _ in draws.roles["marked"]]
    assert torch.equal(torch.zeros(64).index_fill(0, torch.tensor(marked), 1).view(8, 8), scene.gone[0, 0, ::2, ::2])
    context, x = denoiser().read(torch.zeros(1, 5, dtype=torch.long)), draws.noise
    given = {"noised": x, "t": torch.ones(1), "context": context}
    with attach(denoiser(), method.variants(item.prompt)["redirected"][1], roles=draws.roles, inputs=given) as run:
        for number in range(STEPS):
            t, then = START * (1 - number / STEPS), START * (1 - (number + 1) / STEPS)
            given = {"noised": x, "t": torch.full((1,), t), "context": context}
            with run.denoising(number, of=STEPS):
                redirected = run(**given)
            with run.paused():
                plain = denoiser()(**given)
            x = x + (then - t) * (plain + 2.0 * (redirected - plain))
            x = torch.where(scene.gone > 0, x, (1 - then) * scene.picture + then * scene.plain)
    assert torch.equal(made_under(method, item), x)
    late = made_under(replace(method, early=0.0), item)
    assert not close_model(late, x), "scores are flattened in early steps alone"
    assert torch.equal((x != late).any(1, keepdim=True) & (scene.gone == 0), torch.zeros_like(scene.gone).bool())


def test_they_are_compared() -> None:
    found = compare(models.denoiser(), [SOFT, TempScale(0.5)], [TwoThings(steps=3)], prompts=4, turns=1)
    assert not found.refused
    results = {r.contender: r for r in found.results}
    assert len({r.nats for r in results.values()}) == 3
    assert all(r.active for name, r in results.items() if name != "unedited")
    erased = compare(models.denoiser(), [AttentiveEraser()], [Erased(steps=4)], prompts=8, turns=0)
    score = {r.contender: r.score for r in erased.results}
    assert score["AttentiveEraser"] == 1 > score["unedited"]


def test_scenes_whose_names_of_places_are_names_of_words_are_refused() -> None:
    class Twice(TwoThings):
        name = "twice"
        about = "Names words and places alike."

        def scene(self, tokenizer: Any, draw: random.Random) -> Any:
            return replace(super().scene(tokenizer, draw), roles={"first": ((0, 4),)})

    small = models.denoiser()
    task = Twice().on(denoiser(), small.tokenizer)
    with pytest.raises(FieldError, match="are names of words too, in the prompt's roles: first"):
        task.item(small.tokenizer, 0, 0)
