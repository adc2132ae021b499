"""`heedful.diagnose`: three passes, the token view, going on after a stop, and plain errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2Model

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.entry import Probe, Readings
from heedful.core.errors import FieldError, RefusedModel, StatisticError, UnknownFieldError
from heedful.core.figures import Role
from heedful.core.kinds.conversion import Progress
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Statistic, Sum
from heedful.diagnosis import run as running
from heedful.diagnosis.measures import chosen
from heedful.diagnosis.run import diagnose
from heedful.diagnosis.view import MOST_KEYS, Attended, TokenView, notable, view_of
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.methods.observe.sink_rate import SinkRate
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from tests.test_diagnose_texts import WORDS, characters


class Marked(Method):
    """Counts the tokens that a role marks, and all tokens; a trial with a role of its own when asked."""

    paper = Paper("P000", "A Test", "A Tester", 2026)
    role: str = "delimiters"
    own: bool = False

    @reads(Site.KEY)
    def count(self, key: Tensor, call: Call) -> Statistic:
        marked = call.marked(self.role).sum() if self.role in call.roles else torch.tensor(0)
        return Sum.of(torch.tensor([float(marked), float(call.is_text.sum())]))

    def answer(self, readings: Readings) -> list[float]:
        return readings[0].value.tolist()


class Tried(Marked):
    """The same on a prompt of its own."""

    def probes(self, vocabulary: Tensor, length: int) -> Iterable[Probe]:
        prompt = vocabulary[:6].expand(2, -1)
        return [Probe(prompt, {"needle": ((1, 3),)}), Probe(prompt, {"needle": ((0, 4),)})]


@pytest.fixture
def model() -> Any:
    return models.tiny("llama")


# the passes


def test_delimiters_are_named_for_each_window_and_every_token_is_read(model: Any) -> None:
    texts = ["a,b;", "abc.de"]
    profile = diagnose(model, texts, tokenizer=characters(), measures=Marked(), length=4)
    assert profile.answer(Marked()) == [3.0, 10.0]
    assert {k: profile.facts[k] for k in ("texts", "windows", "tokens", "left_out")} == {
        "texts": 2, "windows": 3, "tokens": 10, "left_out": 0,
    }  # fmt: skip
    batched = diagnose(model, texts, tokenizer=characters(), measures=Marked(), length=4, batch=3)
    assert batched.answer(Marked()) == [0.0, 10.0]


def test_texts_in_a_batch_and_one_by_one_are_the_same(model: Any) -> None:
    one, many = (
        diagnose(model, [WORDS[:50], WORDS[:31]], tokenizer=characters(), measures="SinkRate", batch=b) for b in (1, 2)
    )
    for key, stat in one.statistics.items():
        torch.testing.assert_close(stat.value, many.statistics[key].value, equal_nan=True)


def test_measures_with_trials_are_run_on_them_alone_with_their_roles(model: Any) -> None:
    seen: list[Progress] = []
    parts = [Marked(), Tried("needle")]
    profile = diagnose(model, "ab,", tokenizer=characters(), measures=parts, progress=seen.append)
    assert profile.answer(Tried("needle")) == [2.0 + 4.0, 6.0 + 6.0]  # its places are those of both rows
    assert profile.answer(Marked()) == [1.0, 3.0]
    assert profile.facts["tokens"] == 3
    assert [(p.stage, p.done, p.total) for p in seen] == [
        ("text", 0, 3), ("text", 3, 3), ("trials", 12, 24), ("trials", 24, 24), ("view", 3, 3),
    ]  # fmt: skip
    assert set(profile.facts["seconds"]) == {"preparing", "text", "trials", "weights", "view"}


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mistral", "t5", "bart"])
def test_other_kinds_of_models_and_ready_tokens(kind: str) -> None:
    profile = diagnose(models.tiny(kind), torch.arange(3, 43).view(2, 20))
    assert profile.facts["tokens"] == 40
    assert profile.view is not None
    assert profile.view.tokens[:2] == ["3 ", "4 "]
    assert profile.findings()


def test_the_model_stays_as_it_was(model: Any) -> None:
    model.train()
    implementation = model.config._attn_implementation
    diagnose(model, torch.arange(8))
    assert model.training
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_view_is_the_map(kind: str) -> None:
    model, tokens = models.tiny(kind), torch.arange(5, 25)
    profile = diagnose(model, tokens, measures=SinkRate(), tile_rows=4)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=tokens[None], output_attentions=True).attentions
    view = profile.view
    assert view is not None
    for i, (layer, head) in enumerate(view.heads):
        weights = maps[layer][0, head]
        torch.testing.assert_close(view.weights[i], weights.topk(MOST_KEYS).values)
        there = view.weights[i] > 0
        torch.testing.assert_close(weights.gather(1, view.keys[i].long())[there], view.weights[i][there])
        torch.testing.assert_close(view.received[i], weights.sum(0) / (weights > 0).sum(0))
        torch.testing.assert_close(view.entropy[i], torch.special.entr(weights).sum(-1))
    assert view.opening.shape == (2, 4, 20, 20)
    for layer in view.layers:
        torch.testing.assert_close(view.opening[layer], maps[layer][0].half())


def test_the_view_has_the_lengths_of_values() -> None:
    model, tokens = models.tiny("llama"), torch.arange(5, 25)
    values: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out, n=n: values.update({n: out[0].detach()}))
    view = diagnose(model, tokens, measures=SinkRate()).view
    assert view is not None
    for i, (layer, head) in enumerate(view.heads):
        each = values[layer].unflatten(-1, (2, 8))[:, head // 2]  # two heads share one key head
        torch.testing.assert_close(view.norms[i], each.norm(dim=-1))


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("edit", [(), (TempScale(0.5),)])
def test_the_view_names_columns_where_tiles_leave_some_out(model: Any, sinks: int, edit: tuple[Any, ...]) -> None:
    with attach(model, Stack((Attended(6), SinkWindow(sinks, 4), *edit)), tile_rows=4) as run:
        run(input_ids=torch.arange(5, 45)[None])
    view = view_of(run[Attended(6)], [(0, 1), (1, 3)], ["x"] * 40)
    for row in range(10, 40):
        seen = {*range(sinks), *range(row - 3, row + 1)}
        for head in range(2):
            there = view.weights[head, row] > 0
            assert set(view.keys[head, row][there].tolist()) == seen


def test_a_view_of_a_text_shorter_than_its_keys(model: Any) -> None:
    view = diagnose(model, torch.arange(5, 8)).view
    assert view is not None
    assert view.weights.shape[1:] == (3, MOST_KEYS)
    assert (view.weights[:, :, 3:] == 0).all()


@pytest.mark.parametrize(("kind", "read"), [("llama", [30]), ("bert", [30, 8])])
def test_the_view_is_of_the_first_tokens_alone(kind: str, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heedful.diagnosis.view.SHOWN", 8)
    model = models.tiny(kind)
    fed: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kw: fed.append(kw["input_ids"].shape[1]), with_kwargs=True)
    view = diagnose(model, WORDS[:30], tokenizer=characters(), measures=SinkRate()).view
    assert fed == read  # tokens that look at later ones are read alone
    assert view is not None
    assert "".join(view.tokens) == WORDS[:8]
    assert view.received.shape[1] == 8


def test_the_view_shows_the_strongest_of_each_role_in_turn() -> None:
    roles = [Role("a", "", {(1, 1): 0.9, (0, 1): 0.8, (0, 2): 0.7}), Role("b", "", {(1, 0): 0.5})]
    assert notable(roles, 2, 4, 3) == [(0, 1), (1, 0), (1, 1)]
    assert notable([], 2, 4, 4) == [(0, 0), (0, 2), (1, 0), (1, 2)]


# going on


class Stop:
    """Interrupts a diagnosis after some windows."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.notes: list[str] = []

    def __call__(self, now: Progress) -> None:
        self.notes += [now.note] if now.note else []
        self.left -= now.stage == "text"
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_stopped_diagnosis_goes_on_where_it_stopped(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    monkeypatch.setattr(running, "SAVE_EVERY", every)
    options: dict[str, Any] = dict(tokenizer=characters(), length=16, measures=[SinkRate(), SinkRate(0.1)])
    whole = diagnose(model, WORDS, **options)
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, WORDS, out=tmp_path, progress=Stop(4), **options)
    read: list[Progress] = []
    profile = diagnose(model, WORDS, out=tmp_path, progress=read.append, **options)
    assert read[0].note == f"goes on after 4 of {whole.facts['windows']} windows read before"
    assert len([p for p in read if p.stage == "text"]) == 1 + whole.facts["windows"] - 4
    for key, stat in whole.statistics.items():
        torch.testing.assert_close(profile.statistics[key].value, stat.value, equal_nan=True)
    counts = ("texts", "windows", "tokens", "left_out", "backends", "settings")
    assert {k: profile.facts[k] for k in counts} == {k: whole.facts[k] for k in counts}
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["profile.json", "statistics"]
    read.clear()
    assert str(diagnose(model, WORDS, out=tmp_path, progress=read.append, **options)) == str(profile)
    assert [p.note for p in read] == [f"finished before: read from {tmp_path}"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"length": 8}, "length"),
        ({"measures": SinkRate(0.1)}, "measures"),
        ({"batch": 2}, "batch"),
        ({"backend": "tiled"}, "backend"),
        ({"texts": WORDS[1:]}, "texts"),
    ],
)
def test_a_folder_of_other_settings_is_refused(model: Any, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    options: dict[str, Any] = dict(texts=WORDS, tokenizer=characters(), length=16, out=tmp_path)
    diagnose(model, **options)
    if named == "backend":  # the default one, said aloud
        diagnose(model, **options, backend="auto")
    with pytest.raises(StatisticError, match=rf"its {named} is .*Name another folder"):
        diagnose(model, **{**options, **change})


# plain errors


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("  \n", "is empty: give a text"),
        ([], "is empty: give one text or more"),
        (["words", ""], "is empty"),
        (3, "must be str, Path"),
        ("a", "holds a single token"),
        (Path("no/such.txt"), r"such.txt': no such file"),
        (torch.tensor([[5, 500]]), "token ids must be from 0 to 127"),
        (torch.ones(3), "whole numbers"),
        (torch.ones(0, dtype=torch.long), "whole numbers"),
    ],
)
def test_texts_that_cannot_be_read(model: Any, texts: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        diagnose(model, texts, tokenizer=characters())


def test_a_length_above_the_models_positions_is_refused(model: Any) -> None:
    with pytest.raises(FieldError, match="has 512 positions; for example length=512"):
        diagnose(model, WORDS, tokenizer=characters(), length=600)
    with pytest.raises(FieldError, match="2 tokens or more"):
        diagnose(model, WORDS, tokenizer=characters(), length=1)
    assert diagnose(model, WORDS, tokenizer=characters()).facts["length"] == 512


def test_other_refusals(model: Any) -> None:
    with pytest.raises(FieldError, match="words need a tokenizer"):
        diagnose(model, WORDS)
    with pytest.raises(FieldError, match="batch"):
        diagnose(model, WORDS, tokenizer=characters(), batch=0)
    with pytest.raises(RefusedModel, match="Linear is not a transformers model"):
        diagnose(torch.nn.Linear(2, 2), WORDS)
    with pytest.raises(FieldError, match="a model that hears takes features of sounds"):
        diagnose(models.tiny("whisper"), WORDS)
    small: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    heard = Wav2Vec2Config(**small, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embedding_groups=2)
    with pytest.raises(RefusedModel, match="takes neither ids nor"):
        diagnose(Wav2Vec2Model(heard), WORDS)


@pytest.mark.parametrize("measures", [SinkWindow(), ["SinkWindow"], ["PruneHeads"]])
def test_what_edits_is_no_measure(measures: Any) -> None:
    with pytest.raises(
        FieldError, match=r"must be methods that read and edit nothing: .*for example measures=\['SinkRate'\]"
    ):
        chosen(measures)


def test_a_class_is_no_measure() -> None:
    with pytest.raises(FieldError, match=r"measures = .*SinkRate.*for example measures=\['SinkRate'\]"):
        diagnose(models.tiny("llama"), WORDS, measures=[SinkRate])  # type: ignore[list-item]


def test_measures_by_name_each_once() -> None:
    assert chosen(["sinkrate", SinkRate(), "sinkrate(epsilon=0.1)"]) == (SinkRate(), SinkRate(0.1))
    with pytest.raises(FieldError, match="names none"):
        chosen([])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    ],
)
def test_too_little_memory_names_a_shorter_length(
    model: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(model.model.layers[0], "forward", lambda *_, **__: fail())
    with pytest.raises(FieldError, match=r"too little memory .* for example length=10"):
        diagnose(model, torch.arange(20))


def test_other_failures_of_the_model_are_not_blamed_on_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(model.model.layers[0], "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        diagnose(model, torch.arange(20))


def test_a_view_must_fit_together() -> None:
    row, opening = torch.zeros(1, 2), torch.zeros(1, 4, 2, 2)
    good = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), row, row, row
    TokenView(["a", "b"], [(0, 0)], *good, [0], opening)
    for i in range(5):
        bad = [torch.zeros(1, 3, *x.shape[2:]) if n == i else x for n, x in enumerate(good)]
        with pytest.raises(FieldError, match="must be those of 1 heads and 2 tokens"):
            TokenView(["a", "b"], [(0, 0)], *bad, [0], opening)
    with pytest.raises(FieldError, match=r"opening = \(1, 4, 2, 2\): .*of 2 layers"):
        TokenView(["a", "b"], [(0, 0)], *good, [0, 1], opening)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_several_windows_at_once_are_read_as_one_by_one_by_both_halves(kind: str) -> None:
    """What fills up the shorter ones is no text, in the decoder neither."""
    model = models.tiny(kind)
    texts = [torch.arange(3, 3 + n) for n in (60, 25, 40)]
    profiles = [diagnose(model, texts, measures=[SinkRate()], batch=batch) for batch in (1, 3)]
    one, several = (profile.answer(SinkRate()).importance for profile in profiles)
    assert all(close_model(x.nan_to_num(-1.0).float(), one[n].nan_to_num(-1.0).float()) for n, x in several.items())


def test_a_misspelt_argument_is_refused_by_the_verb_that_was_given_it() -> None:
    with pytest.raises(UnknownFieldError, match=r"diagnose\(\)\.lenght = 5: .*Did you mean length\? .*, backend, "):
        diagnose(models.tiny("llama"), torch.arange(9), lenght=5)
