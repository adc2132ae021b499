"""Scenes that a diffusion model draws: what is asked, who judges, how methods act, and what is refused."""

from __future__ import annotations

import copy
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from claims._guided import STEPS, under
from claims._pictures import COLOURS, SHAPES, WORDS, denoiser, draw, judge, sample
from heedful import attach, attached, models
from heedful.bench.answer import answer
from heedful.bench.asking import going_on
from heedful.bench.compare import compare
from heedful.bench.comparison import Comparison
from heedful.bench.cost import cost
from heedful.bench.records import Answered, Cost
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, RefusedModel, SiteError
from heedful.core.kinds.tokens import Prompt
from heedful.drawing import drawn
from heedful.methods import CONFORM, HRV, AttendAndExcite, TempScale
from heedful.models.small_denoiser import speller
from heedful.tasks import Scene, Scenes
from heedful.tasks.scenes import KINDS, ROLES, TwoThings, halves, unclean
from heedful.tasks.task import Item, Sheet
from heedful.text_models import text_model

SHARP = TempScale(0.5)


def small() -> models.Loaded:
    return models.Loaded(denoiser(), speller(), "small denoiser")  # one for all, which loads once


@pytest.fixture(scope="module")
def task() -> TwoThings:
    return TwoThings().on(denoiser(), speller())


def noise_of(item: Item) -> Tensor:
    assert item.shown.draws is not None
    return item.shown.draws.noise


def sheet_of(item: Item, what: Any = None, model: nn.Module | None = None) -> Sheet:
    with text_model(model or denoiser(), what, item.shown) as speaker:
        return answer(speaker, item)


def read(item: Item) -> Tensor:
    return denoiser().read(torch.tensor([item.prompt.tokens]))


def thing(colour: str, shape: str) -> int:
    return 1 + SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour)


def things_of(words: Tensor) -> Tensor:
    """What words `[b 5]` say of either half, by number; nothing is 0."""
    told = [WORDS[int(word)] for word in words[:, :4].flatten()]
    pairs = zip(told[::2], told[1::2], strict=True)
    return torch.tensor([0 if colour == "nothing" else thing(colour, shape) for colour, shape in pairs]).view(-1, 2)


def test_a_scene_asks_for_two_things_and_says_where_their_words_are(task: TwoThings) -> None:
    items = task.items(speller(), 8)
    for item in items:
        words = [WORDS[token] for token in item.prompt.tokens]
        assert item.options == ((thing(*words[:2]), thing(*words[2:4])),)
        roles = dict(item.prompt.roles)
        named = [words[i] for a, b in roles.pop("things") for i in range(a, b)]
        said = {role: [words[i] for i in range(a, b)] for role, ((a, b),) in roles.items()}
        assert said == {"subjects": words[:4], "first": words[:2], "second": words[2:4], "ground": words[4:]}
        assert named == words[:4]
        assert task.chance(item) == 1 / KINDS
        assert item.size == 7
    again = task.items(speller(), 3)
    assert all(torch.equal(noise_of(a), noise_of(b)) for a, b in zip(items, again, strict=False))
    other = task.items(speller(), 3, seed=1)
    assert not any(torch.equal(noise_of(a), noise_of(b)) for a, b in zip(items, other, strict=False))
    assert len({item.prompt.tokens for item in items}) > 6


def test_the_judge_names_what_the_claims_judge_names() -> None:
    pictures, words, _ = draw(60, torch.Generator().manual_seed(3))
    assert torch.equal(TwoThings().judge(pictures).argmax(-1), things_of(words))
    assert close(unclean(pictures), torch.zeros_like(pictures))
    spoilt = pictures + 0.3 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    seen = TwoThings().judge(spoilt)
    assert torch.equal(seen.argmax(-1), things_of(judge(spoilt)))
    table, kinds, _ = halves()
    left = spoilt[0, :, :, :8].flatten()
    far = [min(float((left - one).square().sum()) for one in table[kinds == kind]) for kind in range(KINDS)]
    assert close(seen[0, 0], -torch.tensor(far))
    assert close(spoilt[0, :, :, :8].flatten() - unclean(spoilt)[0, :, :, :8].flatten(), table[far_place(left, table)])


def far_place(half: Tensor, table: Tensor) -> int:
    return min(range(len(table)), key=lambda i: float((half - table[i]).square().sum()))


def test_what_the_judge_is_worth_is_measured_on_real_pictures(task: TwoThings) -> None:
    pictures, things = TwoThings().real(denoiser(), speller())
    scores = TwoThings().judge(pictures).double().flatten(0, 1)
    known = task.judged
    assert known is not None
    assert known.right == float((scores.argmax(-1) == things.flatten()).double().mean()) > 0.95
    assert (known.things, known.places, known.kinds) == (200, 2, KINDS)
    scales = [float(10.0**e / scores.std()) for e in torch.linspace(-1, 2, 31, dtype=torch.float64)]
    losses = [float(cross_entropy(z * scores, things.flatten(), label_smoothing=1 / 202)) for z in scales]
    assert known.scale == pytest.approx(scales[losses.index(min(losses))])
    assert task.told == (
        "its judge names 100% of 200 things in real pictures right",
        "prefill is the making of a picture, and a thing counts as a token",
    )
    assert repr(task) == repr(TwoThings()) == "TwoThings(steps=10, least=0.9)"
    # real pictures are spoilt as much as drawn ones are
    made = sample(torch.cat([noise_of(item) for item in task.items(speller(), 20)]), flow_of(task), STEPS)
    assert 0.7 < float(unclean(pictures).norm() / len(pictures) ** 0.5) / float(unclean(made).norm() / 20**0.5) < 1.3


def flow_of(task: TwoThings) -> Any:
    context = torch.cat([read(item) for item in task.items(speller(), 20)])
    return lambda _, x, t: denoiser()(noised=x, t=t, context=context)


def test_scores_and_nats_are_those_of_the_picture(task: TwoThings) -> None:
    assert task.judged is not None
    hits = []
    for item in task.items(speller(), 6):
        made = sample(noise_of(item), lambda _, x, t, item=item: denoiser()(noised=x, t=t, context=read(item)), STEPS)
        logits = (task.judged.scale * task.judge(made)[0].double()).log_softmax(-1)
        (asked,) = item.options
        sheet = sheet_of(item)
        right = [int(logits[side].argmax()) == asked[side] for side in (0, 1)]
        assert list(sheet.greedy) == right == (things_of(judge(made))[0] == torch.tensor(asked)).tolist()
        assert task.score(item, sheet) == sum(right) / 2
        want = torch.stack([logits[0, asked[0]], logits[1, asked[1]]])
        assert close_model(sheet.options[0], want.float())
        assert close_model(torch.tensor(task.nats(item, sheet)), want.mean().float())
        hits += right
        turned = sheet_of(replace(item, options=(asked, asked[::-1])))  # read once, and each option from its beginning
        assert close_model(turned.options[1], logits[torch.arange(2), torch.tensor(asked[::-1])].float())
    assert 0 < sum(hits) < len(hits), "some are right and some are not, or the test tells little"


def test_the_right_thing_in_the_wrong_place_is_wrong(task: TwoThings) -> None:
    mixed = copy.deepcopy(denoiser())
    mixed.places.data = mixed.places.data[[2, 3, 0, 1, 4]]  # what is asked for on the left is drawn on the right
    items = task.items(speller(), 16)
    plain, other = (sum(task.score(item, sheet_of(item, model=m)) for item in items) / 16 for m in (None, mixed))
    assert plain > 0.4
    assert other < 0.2


def test_a_method_acts_in_every_step_or_in_those_it_is_for(task: TwoThings) -> None:
    item = task.items(speller(), 1)[0]
    assert task.judged is not None
    found = []
    for what in (SHARP, SHARP.when(steps=range(3)), HRV("subjects", 0.5)):
        made = under(what, noise_of(item), read(item), roles=ROLES)
        logits = (task.judged.scale * task.judge(made)[0].double()).log_softmax(-1)
        sheet = sheet_of(item, what)
        assert close_model(sheet.options[0], logits[torch.arange(2), torch.tensor(item.options[0])].float())
        found.append(sheet.means[0])
    assert len({*found, sheet_of(item).means[0]}) == 4, "each changes the picture in its own way"


def moved_by_hand(method: Any, item: Item) -> Tensor:
    x, context = noise_of(item), read(item)
    with attach(denoiser(), method, roles=ROLES, inputs={"noised": x, "t": torch.ones(1), "context": context}) as run:
        for number in range(STEPS):
            t = torch.full((1,), 1 - number / STEPS)
            with run.denoising(number, of=STEPS):
                with torch.enable_grad():
                    run(noised=x.requires_grad_(), t=t, context=context)
                    x = method.moved(x, run.loss(), number, of=STEPS)
                with torch.no_grad():
                    x = x - run(noised=x, t=t, context=context) / STEPS
    return x


@pytest.mark.parametrize("method", [AttendAndExcite(grid=(8, 8), sharpness=5.0), CONFORM(grid=(8, 8))])
def test_what_is_denoised_is_moved_before_each_step(task: TwoThings, method: Any) -> None:
    item = task.items(speller(), 1)[0]
    assert task.judged is not None
    made = moved_by_hand(method, item)
    logits = (task.judged.scale * task.judge(made)[0].double()).log_softmax(-1)
    with text_model(denoiser(), method, item.shown) as speaker:
        sheet = answer(speaker, item)
        assert speaker.active
    assert close_model(sheet.options[0], logits[torch.arange(2), torch.tensor(item.options[0])].float())
    assert sheet.means != sheet_of(item).means
    # where it is for no step, nothing moves
    assert close_model(sheet_of(item, method.when(steps=range(9, 10))).options[0], sheet_of(item).options[0])


def test_two_that_move_what_is_denoised_are_refused(task: TwoThings) -> None:
    found = compare(small(), [AttendAndExcite(grid=(8, 8)) | CONFORM(grid=(8, 8))], [TwoThings()], prompts=2, turns=0)
    assert attached(denoiser()) is None, "the model is left as it was"
    (refused,) = found.refused
    assert "both move what is denoised" in refused.reason
    assert sum(isinstance(record, Answered) for record in found.records) == 2


def test_it_is_compared(tmp_path: Path) -> None:
    methods = [
        "tempscale(0.5)", "hrv(role='subjects',factor=2.0)", "attentionsorting", "largepig(role='subjects')",
        "pruneheads(groups=((0,0),))", "tome(count=8)", "hrv(role='marked')",
    ]  # fmt: skip
    found = compare(small(), methods, [TwoThings(steps=3)], prompts=4, turns=1, batch=[1, 2], out=tmp_path / "out")
    assert found.facts["layers"] == 6
    assert (found.facts["model"], found.facts["kind"], found.facts["width"]) == ("small denoiser", "Denoiser", None)
    results = {r.contender: r for r in found.results}
    assert set(results) == {"unedited", "TempScale(tau=0.5)", "HRV(role='subjects', factor=2.0)"}
    assert len({r.nats for r in results.values()}) == 3
    assert all(r.active for name, r in results.items() if name != "unedited")
    told = {r.contender: r.reason for r in found.refused}
    assert "rearranges the tokens of a text, and these prompts are scenes to draw" in told["AttentionSorting"]
    assert "combines next-token logits, and a scene has none" in told["LargePiG(role='subjects')"]
    assert "acts on texts or on weights, and a scene is drawn under what" in told["PruneHeads(groups=((0, 0),))"]
    assert "tokens are merged where each attends to all, and here keys are another sequence's" in told["ToMe"]
    assert "they mark 'subjects', 'first', 'second', 'ground', 'things'" in told["HRV"]
    costs = [r for r in found.records if isinstance(r, Cost)]
    assert {(r.tokens, r.step, r.cache, r.density) for r in costs} == {(5, None, 0, None)}
    assert {r.batch for r in costs} == {1, 2}
    assert [name for name, _ in found.matrix.columns] == ["verdict", "scenes", "prefill"]
    assert "scenes: its judge names" in str(found)
    assert "judge names" in found.page(tmp_path / "page.html").read_text()
    assert Comparison.load(found.save(tmp_path / "kept.jsonl")).records == found.records
    again = compare(small(), methods[:2], [TwoThings(steps=3)], prompts=4, turns=0, out=tmp_path / "out")
    assert [r.score for r in again.results] == [r.score for r in found.results]


def test_an_error_of_the_drawing_model_is_a_reason_under_a_method_alone(task: TwoThings) -> None:
    item = task.items(speller(), 1)[0]
    with pytest.raises(SiteError, match="Denoiser cannot go on under it: too few"), going_on(denoiser(), SHARP, item):
        raise RuntimeError("too few")
    with pytest.raises(RuntimeError, match=r"^too few$"), going_on(denoiser(), None, item):
        raise RuntimeError("too few")


def test_rows_of_a_batch_are_the_same_picture(task: TwoThings) -> None:
    item = task.items(speller(), 1)[0]
    assert item.shown.draws is not None
    made = drawn(denoiser(), None, None, item.shown.draws, torch.cat([noise_of(item)] * 3))
    assert close(made[0], made[2])
    sizes: list[int] = []
    seen = replace(item.shown.draws, judge=lambda x: (sizes.append(len(x)), task.judge(x))[1])  # type: ignore[func-returns-value]
    item = replace(item, shown=replace(item.shown, draws=seen))
    assert cost(denoiser(), None, "unedited", item, 1, 3).batch == 3
    assert sizes == [3]


def test_the_task_goes_to_other_processes(task: TwoThings) -> None:
    item = task.items(speller(), 1)[0]
    again, other = pickle.loads(cloudpickle.dumps((task, item)))
    assert sheet_of(other).means == sheet_of(item).means
    assert repr(again) == repr(task)


def test_models_that_do_not_draw_are_refused_and_one_that_draws_reads_no_texts() -> None:
    with pytest.raises(RefusedModel, match=r"scenes: Llama\w+ is not the diffusion model .*models.denoiser\(\)"):
        compare((models.tiny("llama"), speller()), [SHARP], ["scenes"])
    told = r"Denoiser is not a transformers model .*\. It can be asked --tasks scene_words,scenes$"
    with pytest.raises(RefusedModel, match=told):
        compare((denoiser(), speller()), [SHARP], ["needle"])


def test_the_scenes_of_the_docs_run_with_a_model_of_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "vision.md").read_text()
    found = re.search(r"### Compared by scenes\n.*?```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    exec(found[1], {})
    told = capsys.readouterr().out
    assert "PixArtTransformer2DModel: 2 methods, 1 task" in told
    assert "colours: its judge names 100% of 18 things in real pictures right." in told
    assert "Guessing scores 33%" in told


class Halves(Scenes):
    """Which half is light: a task in miniature, of which everything can be said."""

    name = "halves"
    about = "Draws a light half and a dark one."
    upside_down: bool = False  # the judge says the contrary
    wide: bool = False  # it says something of the whole too

    def scene(self, tokenizer: Any, draw: random.Random) -> Scene:
        light = draw.randrange(2)
        return Scene(Prompt((light, 1 - light)), (light, 1 - light), torch.zeros(1, 2))

    def step(self, scene: Scene, model: Any, x: Tensor, number: int) -> Tensor:
        found: Tensor = x + model(torch.tensor([scene.prompt.tokens]).float())
        return found

    def judge(self, pictures: Tensor) -> Tensor:
        seen = torch.stack([-pictures, pictures], -1) * (-1 if self.upside_down else 1)
        return torch.cat([seen, seen[:, :1]], 1) if self.wide else seen

    def real(self, model: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[1, 0], [0, 1]])


def test_a_judge_that_names_real_pictures_wrong_is_refused() -> None:
    assert Halves().on(nn.Identity(), None).judged is not None
    with pytest.raises(FieldError, match=r"names 0% of 4 things in real pictures right, less than least=0\.9"):
        Halves(upside_down=True).on(nn.Identity(), None)
    with pytest.raises(FieldError, match="says something of 6 places, and the real pictures have 4"):
        Halves(wide=True).on(nn.Identity(), None)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"steps": 0}, "must be 1 or more"), ({"least": 0.0}, "must be above 0"), ({"least": 1.5}, "must be a")],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(FieldError, match=rule):
        Halves(**settings)


def test_the_model_is_looked_at_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heedful.tasks._scenes.device_of", lambda _: torch.device("meta"))

    class Still(Halves):
        name = "still"
        about = "Leaves noise as it is."

        def step(self, scene: Scene, model: Any, x: Tensor, number: int) -> Tensor:
            return x

    assert Still().inputs(nn.Identity(), None)().device.type == "meta"


@pytest.mark.parametrize("things", [(0, 2), (-1, 0), (0, 1, 0), ()])
def test_items_want_a_model_and_things_that_the_judge_knows(things: tuple[int, ...]) -> None:
    with pytest.raises(FieldError, match="makes items for one model alone"):
        Halves().items(speller(), 1)

    class Strange(Halves):
        name = "strange"
        about = "Asks for what nobody can see."

        def scene(self, tokenizer: Any, draw: random.Random) -> Scene:
            return replace(super().scene(tokenizer, draw), things=things)

    with pytest.raises(FieldError, match="must be 1 to 2 numbers, from 0, of the 2 things that the judge knows"):
        Strange().on(nn.Identity(), None).items(speller(), 1)
