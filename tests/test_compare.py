"""`heedful.compare` on a tiny model: answers, costs, going on after a stop, refusals, and what it adds up to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.bench.answer import answer
from heedful.bench.compare import compare, label
from heedful.bench.comparison import Comparison
from heedful.bench.cost import WARM_UP
from heedful.bench.records import Answered, Cost, Refused, line, read
from heedful.bench.results import PLAIN, Ratio
from heedful.conformance.tolerances import close_model
from heedful.core.call import CachedKV, Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, RefusedModel, SiteError, StatisticError
from heedful.core.files import RECORDS
from heedful.core.fitted import Fitted
from heedful.core.kinds.conversion import Progress
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt, Tokens
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.methods.sparse.cache.kivi import KIVI
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from heedful.tasks.task import Item, Sheet, Task, chosen, recalled
from heedful.text_models import text_model

PAPER = Paper("test", "A test", "Nobody", 2026)


class Echo(Task):
    name = "echo"
    about = "Which of three pairs comes next."
    length: int = 20

    def item(self, tokenizer: Any, number: int, seed: int) -> Item:
        tokens = self.draw(seed, number).choices(range(3, 127), k=self.length)
        options = ((tokens[3], tokens[4]), (5, 6), (7, 8, 9))
        return Item(Prompt(tuple(tokens), {"half": ((0, 10),)}), options, cut=12, labels={"length": self.length})

    def score(self, item: Item, sheet: Sheet) -> float:
        return chosen(sheet)

    def chance(self, item: Item) -> float:
        return 1 / 3


class Loss(Task):
    name = "loss"
    about = "Loss."
    unit = "nats a token"
    more_is_better = False

    def item(self, tokenizer: Any, number: int, seed: int) -> Item:
        return Item(Prompt(tuple(self.draw(seed, number).choices(range(3, 127), k=16))))

    def score(self, item: Item, sheet: Sheet) -> float:
        return float(sheet.losses.mean())


class Half(Surgery):
    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return weights.keep_groups((0,))


class Turned(Tokens):
    paper = PAPER

    def arrange(self, prompt: Prompt, read: Any) -> Prompt:
        return Prompt(prompt.tokens[::-1], prompt.roles)


class Against(Decode):
    paper = PAPER

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        return {"all": (prompt, Stack()), "sharp": (prompt, Stack((TempScale(0.5),)))}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return 2 * logits["all"] - logits["sharp"]


class Remembering(Method):
    """Drops one more old entry each time it has seen a token: its memory must not leak from one option to another."""

    paper = PAPER
    chunk_invariant = False

    @at(Site.CACHE)
    def drop(self, entries: CachedKV, call: Call) -> Tensor:
        call.state.run["seen"] = call.state.run.get("seen", 0) + 1
        return entries.is_filled & (entries.positions.position >= call.state.run["seen"])


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded(models.tiny("llama"), object(), "tiny")


def teacher(model: Any, tokens: tuple[int, ...], option: tuple[int, ...]) -> Tensor:
    """The log-probability of a continuation, from the whole text at once and without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*tokens, *option]])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(tokens) - 1 + i, token] for i, token in enumerate(option)])


def test_answers_are_those_of_the_whole_text(loaded) -> None:
    item = Echo().item(None, 0, 0)
    with text_model(loaded.model) as speaker:
        sheet = answer(speaker, item)
    for found, option in zip(sheet.options, item.options, strict=True):
        assert close_model(found, teacher(loaded.model, item.prompt.tokens, option))
    assert len(sheet.losses) == 0


def test_a_prompt_without_options_is_graded_itself(loaded) -> None:
    for cut in (None, 6):
        prompt = Loss().item(None, 0, 0).prompt
        with text_model(loaded.model) as speaker:
            sheet = answer(speaker, Item(prompt, cut=cut))
        wanted = -teacher(loaded.model, prompt.tokens[: cut or 1], prompt.tokens[cut or 1 :])
        assert close_model(sheet.losses, wanted)


def test_options_do_not_touch_each_other(loaded) -> None:
    item = Echo().item(None, 0, 0)
    found = []
    for options in (item.options, item.options[::-1], item.options[2:]):
        with text_model(loaded.model, Remembering()) as speaker:
            found.append(answer(speaker, Item(item.prompt, options)).options)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1][::-1], strict=True))
    assert torch.equal(found[0][2], found[2][0])


def test_a_new_prompt_begins_with_nothing_remembered(loaded) -> None:
    item = Echo().item(None, 0, 0)
    with text_model(loaded.model, Remembering()) as speaker:
        first, again = answer(speaker, item), answer(speaker, item)
    assert all(torch.equal(a, b) for a, b in zip(first.options, again.options, strict=True))


def test_greedy_is_what_generate_says(loaded) -> None:
    prompt = Echo().item(None, 0, 0).prompt
    ids = torch.tensor([prompt.tokens])
    own = loaded.model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    right = tuple(own[0, len(prompt) :].tolist())
    with text_model(loaded.model) as speaker:
        assert recalled(answer(speaker, Item(prompt, (right,)))) == 1
        assert recalled(answer(speaker, Item(prompt, ((*right[:3], right[3] ^ 1),)))) == 0


@pytest.mark.parametrize("what", [SinkWindow(1, 4), SinkWindow(1, 4) | TempScale(0.8), Half(), Turned(), Against()])
def test_every_kind_of_contender_is_tried(loaded, what) -> None:
    config = loaded.model.config._attn_implementation
    found = compare(loaded, [what], [Echo()], prompts=4, turns=1)
    mine = [r for r in found.records if isinstance(r, Answered) and r.contender != PLAIN]
    assert len(mine) == 4
    assert all(r.active for r in mine)
    assert any(a.nats != b.nats for a, b in found._pairs[repr(Echo()), found.contenders[1]])
    assert [p.contender for p in found.prices] == found.contenders
    assert loaded.model.config._attn_implementation == config


def test_numbers_are_paired_with_the_unedited_model(loaded) -> None:
    tasks = (Echo(), Loss())
    found = compare(loaded, {"narrow": SinkWindow(1, 4)}, tasks, prompts=5, turns=0)
    for task in tasks:
        plain, mine = (r for r in found.results if r.task == repr(task))
        assert (plain.contender, mine.contender, mine.prompts) == (PLAIN, "narrow", 5)
        with text_model(loaded.model, SinkWindow(1, 4)) as speaker:
            scores = [task.score(item, answer(speaker, item)) for item in task.items(None, 5)]
        assert mine.score == pytest.approx(sum(scores) / 5)
        assert mine.gap is not None
        assert mine.gap.mean == pytest.approx(mine.score - plain.score)
        assert mine.gap.low <= mine.gap.mean <= mine.gap.high
    assert not found.prices


def test_a_comparison_goes_on_where_it_stopped(loaded, tmp_path: Path) -> None:
    def stop(now: Progress) -> None:
        if now.done == 7:
            raise KeyboardInterrupt

    methods = [SinkWindow(1, 4), TempScale(0.5)]
    with pytest.raises(KeyboardInterrupt):
        compare(loaded, methods, [Echo()], prompts=4, turns=1, out=tmp_path, progress=stop)
    file = tmp_path / RECORDS
    kept = len(read(file)[1])
    assert 6 <= kept <= 7
    with file.open("a") as torn:
        torn.write('{"record": "answered", "contender": "SinkWin')  # as a kill leaves it
    notes = []
    options: dict[str, Any] = {"prompts": 4, "turns": 1, "out": tmp_path}
    found = compare(loaded, methods, [Echo()], **options, progress=lambda p: notes.append(p.note))
    assert any(f"after {kept} records" in note for note in notes)
    assert {r.key for r in found.records if isinstance(r, Answered)} == {
        (name, repr(Echo()), 0, n) for name in found.contenders for n in range(4)
    }
    assert Comparison.load(tmp_path).results == found.results
    again = compare(loaded, methods, [Echo()], prompts=4, turns=1, out=tmp_path)
    assert again.records == found.records
    more = compare(loaded, [TempScale(0.7)], [Echo()], prompts=4, turns=0, out=tmp_path)
    assert more.contenders == [*found.contenders, "TempScale(tau=0.7)"]
    other = models.Loaded(models.tiny("qwen3"), object(), "other")
    with pytest.raises(StatisticError, match="weights is"):
        compare(other, methods, [Echo()], prompts=4, out=tmp_path)


def test_comparisons_merge(loaded, tmp_path: Path) -> None:
    one = compare(loaded, [SinkWindow(1, 4)], [Echo()], prompts=4, turns=1)
    two = compare(loaded, [TempScale(0.5)], [Echo(), Loss()], prompts=4, turns=0)
    both = one + two
    assert both.contenders == [PLAIN, *one.contenders[1:], *two.contenders[1:]]
    assert (both.results[1].score, both.results[1].prompts) == (one.results[1].score, 4)
    paths = [c.save(tmp_path / f"{i}.jsonl") for i, c in enumerate((one, two))]
    assert Comparison.load(*paths).results == both.results
    text = paths[0].read_text().splitlines()
    paths[0].write_text("\n".join([text[0], "nonsense", *text[1:]]) + "\n")
    with pytest.raises(StatisticError, match="line 2"):
        Comparison.load(paths[0])


class Needy(Method):
    """Cannot act without a marked span."""

    paper = PAPER

    @at(Site.PATTERN)
    def look(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern * call.marked("half")[..., None, :]


def test_what_cannot_take_a_task_is_refused_with_the_reason(loaded) -> None:
    found = compare(loaded, [Needy(), Turned()], [Echo(), Loss()], prompts=3, turns=1)
    told = {(r.contender, r.task): r.reason for r in found.refused}
    assert set(told) == {("Needy", repr(Loss())), ("Turned", repr(Loss()))}
    assert "half" in told["Needy", repr(Loss())]
    assert {(r.contender, r.task) for r in found.results} >= {("Needy", repr(Echo())), ("Turned", repr(Echo()))}
    assert any("Needy was refused on loss" in f.text for f in found.description().findings)


def test_a_refused_task_leaves_no_score_and_is_tried_again(loaded, tmp_path: Path) -> None:
    class Third(Needy):
        paper = PAPER

        @at(Site.PATTERN)
        def look(self, pattern: Tensor, call: Call) -> Tensor:
            if call.forward > 14:
                raise SiteError("enough")
            return pattern * 0.5

    found = compare(loaded, [Third()], [Echo()], prompts=9, turns=0, out=tmp_path)
    assert [r.reason for r in found.refused] == ["enough"]
    assert any(isinstance(r, Answered) and r.contender == "Third" for r in found.records)
    assert [r.contender for r in found.results] == [PLAIN]
    notes: list[str] = []
    compare(loaded, [Third()], [Echo()], prompts=9, turns=0, out=tmp_path, progress=lambda p: notes.append(p.note))
    assert any("enough" in note for note in notes)


def test_numbers_that_are_none_are_refused(loaded, tmp_path: Path) -> None:
    found = compare(loaded, [TempScale(1e-38), TempScale(0.5)], [Echo()], prompts=2, turns=0, out=tmp_path)
    assert [r.contender for r in found.refused] == ["TempScale(tau=1e-38)"]
    assert {r.contender for r in found.results} == {PLAIN, "TempScale(tau=0.5)"}


def test_one_name_is_one_method(loaded, tmp_path: Path) -> None:
    compare(loaded, {"mine": TempScale(0.9)}, [Echo()], prompts=2, turns=0, out=tmp_path)
    with pytest.raises(StatisticError, match="'mine' is TempScale"):
        compare(loaded, {"mine": TempScale(0.1)}, [Echo()], prompts=2, turns=0, out=tmp_path)
    with pytest.raises(StatisticError, match="how is"):
        compare(loaded, {"mine": TempScale(0.9)}, [Echo()], prompts=2, turns=0, out=tmp_path, backend="reference")
    one, two = (Fitted({"x": torch.full((30,), float(i))}) for i in (1, 2))
    assert label(Learned(one)) != label(Learned(two)) != "Learned"


class Learned(Method):
    paper = PAPER
    found: Fitted | None = None

    @at(Site.PATTERN)
    def look(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern


def test_what_does_nothing_is_called_out(loaded) -> None:
    found = compare(loaded, [TempScale(1.0), SinkWindow(0, 1000)], [Echo()], prompts=3, turns=0)
    told = [f.text for f in found.description().findings]
    assert any(t.startswith("TempScale(tau=1.0) changed nothing") for t in told)
    assert any(t.startswith("SinkWindow(sinks=0, window=1000) changed nothing") for t in told)
    found = compare(loaded, [KIVI()], [Echo()], prompts=3, turns=0)
    told = [f.text for f in found.description().findings]
    why = r"changed nothing: the newest 128 tokens are whole, and the text has \d+: a smaller residual would act\."
    assert any(re.search(why, t) for t in told)


@pytest.mark.parametrize(
    ("values", "said"),
    [([TempScale(0.9)], "; 1 interval holds at"), ([TempScale(0.9), TempScale(0.8)], "; 2 intervals")],
)
def test_the_lead_counts_its_intervals(loaded, values: list[Method], said: str) -> None:
    found = compare(loaded, values, [Echo()], prompts=2, turns=0)
    assert said in found.description().findings[0].text


def test_costs_are_counted_against_the_unedited_model(loaded) -> None:
    found = compare(loaded, [SinkWindow(1, 4)], [Echo(40)], prompts=2, turns=2)
    plain, mine = found.prices
    assert plain.ratios == dict.fromkeys(("prefill", "token", "cache"), Ratio(1, 1, 1))
    layers, entries = 2, 40
    assert plain.cache == 2 * layers * 2 * entries * loaded.model.config.head_dim * 4
    assert mine.ratios["cache"].high < 0.25
    assert mine.ratios["prefill"].low <= mine.ratios["prefill"].median <= mine.ratios["prefill"].high
    assert (mine.turns, mine.held) == (2, 0.5)
    assert mine.ratios["pairs"].median == pytest.approx(
        sum(min(i + 1, 4) + (i >= 4) for i in range(40)) / (40 * 41 / 2)
    )
    assert {r.turn for r in found.records if isinstance(r, Cost)} == {WARM_UP, 1, 2}


def test_methods_are_values_or_their_spelling(loaded) -> None:
    written = compare(loaded, ["sinkwindow(1, 4)|tempscale(tau=0.5)"], [Echo()], prompts=2, turns=0)
    assert written.contenders[1:] == ["SinkWindow(sinks=1, window=4) | TempScale(tau=0.5)"]
    assert compare(loaded, {"mine": "KNorm"}, [Echo()], prompts=2, turns=0).facts["contenders"] == {
        "mine": "KNorm(budget=0.5)"
    }


def test_labels_name_what_differs() -> None:
    assert label(SinkWindow()) == "SinkWindow"
    assert label(SinkWindow(window=3).on(layers=[1]) | TempScale(0.5)) == (
        "SinkWindow(window=3).on(layers=[1]) | TempScale(tau=0.5)"
    )


def test_bad_input_is_named(loaded) -> None:
    for problem, call in (
        ("methods", lambda: compare(loaded, [], [Echo()])),
        ("methods", lambda: compare(loaded, [SinkWindow], [Echo()])),
        (r"Surgery \| str\]; for example", lambda: compare(loaded, [Echo()], [Echo()])),
        (r"Surgery \| str\] \(this suits tasks=\); for", lambda: compare(loaded, [Echo()], [SinkWindow()])),
        (r"methods = 'knorm': must", lambda: compare(loaded, "knorm", [Echo()])),
        (r"methods = .* \| SinkWindow\(.*: must", lambda: compare(loaded, TempScale(0.5) | SinkWindow(), [Echo()])),
        ("methods", lambda: compare(loaded, {PLAIN: SinkWindow()}, [Echo()])),
        ("tasks", lambda: compare(loaded, [SinkWindow()], [])),
        (
            r"prompts of .* positions; for example tasks=\[Echo\(length=",
            lambda: compare(loaded, [SinkWindow()], [Echo(5000)]),
        ),
        ("prompts", lambda: compare(loaded, [SinkWindow()], [Echo()], prompts=1)),
        ("turns", lambda: compare(loaded, [SinkWindow()], [Echo()], turns=-1)),
        ("tokenizer", lambda: compare((loaded.model, None), [SinkWindow()], [Echo()])),
    ):
        with pytest.raises(FieldError, match=problem):
            call()
    with pytest.raises(RefusedModel, match="continued"):
        compare((models.tiny("bert"), object()), [SinkWindow()], [Echo()])


def test_records_are_plain_lines() -> None:
    for record in (Answered("a", "t", 0, 1, 1.0, -0.5, None, 0.1, True, {"depth": 0.5}), Refused("a", "", "why")):
        told = json.loads(line(record))
        assert told.pop("record") == type(record).__name__.lower()
        assert type(record)(**told) == record
    assert heedful.compare is compare


def test_page_and_tables(loaded, tmp_path: Path) -> None:
    found = compare(loaded, [SinkWindow(1, 4), Needy()], [Echo(), Loss()], prompts=3, turns=1)
    text = found.page(tmp_path / "page.html").read_text()
    assert "Efficient Streaming Language Models" in text
    for figure in found.description().figures:
        assert figure.title in text
        assert getattr(found.plot, figure.key)().data
    tables = found.to_pandas()
    assert list(tables["costs"]["contender"]) == [p.contender for p in found.prices]
    assert {"prefill", "prefill_ratio", "prefill_ratio_low", "cache_ratio_high"} < set(tables["costs"].columns)
    assert {"gap", "gap_low", "gap_high", "score"} < set(tables["results"].columns)
    assert len(tables["results"]) == len(found.results)
    assert "unedited" in str(found)
    answers = sum(isinstance(record, Answered) for record in found.records)
    assert repr(found) == f"Comparison({found.facts['model']}: 2 methods on echo, loss, {answers} answers)"
