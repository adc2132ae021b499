"""Speech that is written down: which sounds are asked, what is written, how words are counted, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import accelerate
import cloudpickle
import pytest
import torch
from torch.nn.functional import one_hot

from heedful import models
from heedful.bench.answer import answer, write
from heedful.bench.compare import compare
from heedful.bench.records import Answered, Cost
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, RefusedModel
from heedful.diagnosis.sounds import writes
from heedful.diagnosis.waves import read_wave
from heedful.methods import SinkWindow, TempScale
from heedful.shown import Writing
from heedful.tasks import find, from_file
from heedful.tasks._sounds import OwnSpeech, spoken, word_errors
from heedful.text_models import text_model
from tests.tasks.beside import SoundReader, sound, spoken_folder, whisper, written
from tests.test_speech import clip


@pytest.mark.parametrize(
    ("said", "written", "wrong"),
    [
        ("One, two; THREE!", "one two three", 0),
        ("don't stop", "dont stop", 0),  # as jiwer takes punctuation out
        ("one two three", "one three", 1 / 3),
        ("one two three", "one two and three", 1 / 3),
        ("one two three", "one too three", 1 / 3),
        ("one two", "", 1),
        ("one", "and one or two", 3),
        ("a b c d", "b c d e", 2 / 4),
        ("Straße ﬁne", "strasse fine", 0),
    ],
)
def test_words_that_are_wrong(said: str, written: str, wrong: float) -> None:
    assert word_errors(said, written) == pytest.approx(wrong)


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert spoken("  «Well-known», $5: it's\nÉtÉ.") == ["wellknown", "5", "its", "été"]


def test_a_folder_of_sounds_is_speech(tmp_path: Path) -> None:
    spoken_folder(tmp_path)
    sound(tmp_path / "lone.wav")
    sound(tmp_path / "mute.wav").with_suffix(".txt").write_text(" ...")
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (tmp_path / "broken.txt").write_text("one")
    task = find(f"{tmp_path}/")
    assert isinstance(task, OwnSpeech)
    assert [(clip.name, clip.words) for clip in task.rows] == [
        (f"{i}.wav", f"One, two; number w{40 + i}!") for i in range(3)
    ]
    assert [why.partition(" (")[0] for why in task.left_out] == [
        "broken.wav: is no WAV file of whole numbers",
        "lone.wav: has no lone.txt beside it, which tells the words that are said",
        "mute.wav: mute.txt holds no words",
    ]
    assert not task.more_is_better
    before = repr(task)
    sound(tmp_path / "0.wav", seed=9)
    assert repr(from_file(tmp_path)) != before  # another sound under the same name is another task


def test_names_are_read_in_any_spelling(tmp_path: Path) -> None:
    for sounds, words in (("a b.WAV", "a b.TXT"), ("ж.Wave", "ж.txt"), ("1.2.wav", "1.2.Txt")):
        sound(tmp_path / sounds)
        (tmp_path / words).write_text("one")
    assert [row.name for row in from_file(tmp_path).rows] == ["1.2.wav", "a b.WAV", "ж.Wave"]  # type: ignore[attr-defined]


class Speaker:
    """Would go on with one token after another, and tells what it was fed."""

    def __init__(self, *then: int) -> None:
        self.then, self.fed = then, list[int]()

    def next(self) -> torch.Tensor:
        return one_hot(torch.tensor(self.then[len(self.fed)]), 8).float()

    def go_on(self, token: int) -> torch.Tensor:
        self.fed.append(token)
        return self.next()


@pytest.mark.parametrize(
    ("most", "said"), [(0, ()), (1, (5,)), (2, (5, 5)), (3, (5, 5, 6)), (4, (5, 5, 6)), (9, (5, 5, 6))]
)
def test_it_writes_until_it_ends_or_all_places_are_full(most: int, said: tuple[int, ...]) -> None:
    speaker: Any = Speaker(5, 5, 6, 2, 7)
    assert write(speaker, speaker.next(), Writing(most, ends=(1, 2))) == said
    assert speaker.fed == list(said if most > len(said) else said[:-1])  # nothing is read that nobody asks after


def test_what_is_never_written_is_not(tmp_path: Path) -> None:
    speaker: Any = Speaker(5, 5, 2)
    assert write(speaker, speaker.next(), Writing(9, ends=(2,), never=(0,), not_first=(5,))) == (1, 5)


def test_a_folder_without_any_that_can_be_asked_is_refused(tmp_path: Path) -> None:
    sound(tmp_path / "lone.wav")
    with pytest.raises(FieldError, match=r"holds nothing that can be asked: lone.wav: has no lone.txt beside it"):
        from_file(tmp_path)


def test_what_is_written_is_what_the_model_writes(tmp_path: Path) -> None:
    given = whisper()
    task = from_file(spoken_folder(tmp_path)).on(given.model, given.tokenizer)
    with text_model(given.model, None, task.item(given.tokenizer, 0, 0).shown) as speaker:
        for item in task.items(given.tokenizer, 3):
            sheet = answer(speaker, item)
            features = item.shown.inputs["input_features"][0]
            places, written, asked = writes(given.model)(features)
            assert (item.shown.places, item.prompt.tokens) == (places, tuple(written[:asked].tolist()))
            assert sheet.said == tuple(written[asked:].tolist())
            said = str(item.labels["said"])
            assert task.score(item, sheet) == word_errors(said, "".join(f" w{i}" for i in sheet.said if i > 2))
            (option,) = item.options
            assert option == (3, 3, 3, int(said[-3:-1]))
            whole = torch.tensor([[*item.prompt.tokens, *option]])
            with torch.no_grad():
                logits = given.model(input_features=features[None], decoder_input_ids=whole).logits[0].log_softmax(-1)
            asked_at = [len(item.prompt) - 1 + i for i in range(len(option))]
            assert close_model(sheet.options[0], logits[asked_at, list(option)])


def test_it_is_compared(tmp_path: Path) -> None:
    given, methods = whisper(), [TempScale(0.2), "pruneheads(groups=((0,0),(1,1)))"]
    found = compare(given, methods, [spoken_folder(tmp_path / "clips")], turns=1, batch=[1, 2], out=tmp_path / "out")
    results = {r.contender: r for r in found.results}
    assert all(r.prompts == 3 for r in results.values())
    assert results["TempScale(tau=0.2)"].active
    answers = [r for r in found.records if isinstance(r, Answered)]
    assert {r.chance for r in answers} == {1.0}
    costs = [r for r in found.records if isinstance(r, Cost)]
    assert {(r.tokens, r.batch) for r in costs} == {(11, 1), (11, 2)}  # ten places of the encoder, and a token
    assert all(r.step is not None and r.cache > 0 and r.density is None for r in costs)
    assert {r.cache for r in costs if r.batch == 2} == {2 * r.cache for r in costs if r.batch == 1}
    assert found.matrix.columns[1] == ("clips", "points, less is better")
    assert "The margin is 5 points." in str(found)
    assert "Score: share of words wrong; less is better. Guessing scores 100%." in str(found)
    assert found.page(tmp_path / "page.html").stat().st_size > 100_000
    again = compare(given, methods, [tmp_path / "clips"], turns=1, batch=[1, 2], out=tmp_path / "out")
    assert again.records == found.records


def test_a_model_that_writes_nothing_right_tells_nothing(tmp_path: Path) -> None:
    given = whisper()
    found = compare(given, [TempScale(0.2)], [spoken_folder(tmp_path, 30)], turns=0)
    plain = next(r for r in found.results if r.contender == "unedited")
    assert plain.score >= 1
    assert found.blind == list(found.tasks)


def test_sounds_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    given = whisper()
    sound(spoken_folder(tmp_path) / "long.wav", 0.5).with_suffix(".txt").write_text("w40")
    found = compare(given, [TempScale(0.2)], [tmp_path], turns=0)
    (about,) = found.tasks.values()
    assert about["left_out"] == ["long.wav: lasts 0.5 s, and the model hears 0.2 s at once; cut it"]
    for i in range(3):
        (tmp_path / f"{i}.wav").unlink()
    with pytest.raises(FieldError, match=r"lasts 0\.5 s"):
        compare(given, [TempScale(0.2)], [tmp_path], turns=0)


def test_words_of_more_tokens_than_the_model_writes_are_left_out(tmp_path: Path) -> None:
    """Twelve are the most, with the one that asks for a text."""
    given = whisper()
    for count in (5, 11, 12):
        sound(tmp_path / f"{count}.wav").with_suffix(".txt").write_text("w40 " * count)
    found = compare(given, [TempScale(0.2)], [tmp_path], turns=0)
    assert {r.prompts for r in found.results} == {2}
    (about,) = found.tasks.values()
    assert about["left_out"] == ["1 longer than the 12 positions of WhisperForConditionalGeneration"]


def test_a_model_whose_weights_are_elsewhere_is_asked_like_a_whole_one(tmp_path: Path) -> None:
    given, where = whisper(), spoken_folder(tmp_path)
    whole = compare(given, [TempScale(0.2)], [where], turns=0)
    apart = given._replace(model=accelerate.cpu_offload(given.model, torch.device("cpu")))
    found = compare(apart, [TempScale(0.2)], [where], turns=0)
    assert [(r.score, r.nats) for r in found.results] == [(r.score, r.nats) for r in whole.results]


def test_models_that_do_not_hear_are_refused_before_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken_folder(tmp_path)
    model = models.tiny("llama")
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("the model ran"))
    with pytest.raises(RefusedModel, match="LlamaForCausalLM does not write down what it hears; name a model such as"):
        compare(models.Loaded(model, SoundReader(), "x"), [TempScale(0.2)], [tmp_path])
    heard: Any = whisper()
    with pytest.raises(FieldError, match=r"^compare\(\).*needs the model's feature extractor"):
        compare(heard._replace(tokenizer=object()), [TempScale(0.2)], [tmp_path])
    with pytest.raises(FieldError, match="prepares sounds and spells no words"):
        compare(heard._replace(tokenizer=SoundReader().feature_extractor), [TempScale(0.2)], [tmp_path])
    with pytest.raises(RefusedModel, match="WhisperForConditionalGeneration is no causal language model"):
        compare(heard, [TempScale(0.2)], ["induction"])


def test_methods_that_sounds_do_not_suit_are_refused(tmp_path: Path) -> None:
    found = compare(whisper(), ["tome(count=1)", "attentionsorting"], [spoken_folder(tmp_path)], turns=0)
    assert [r.contender for r in found.refused] == ["ToMe(count=1)", "AttentionSorting"]
    told = " ".join(r.reason for r in found.refused)
    assert "it is for images, and these prompts are sounds" in told
    assert "rearranges the tokens of a text, and these prompts are sounds" in told


def test_items_want_a_model(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="makes items for one model alone"):
        from_file(spoken_folder(tmp_path)).items(SoundReader(), 1)


def test_a_method_that_changed_the_encoder_alone_changed_something(tmp_path: Path) -> None:
    """Its step on caches finds too few tokens in the decoder's; its mask is another in the encoder all the same."""
    given = whisper()
    task = from_file(spoken_folder(tmp_path)).on(given.model, given.tokenizer)
    (item,) = task.items(given.tokenizer, 1)
    with text_model(given.model, None, item.shown) as speaker:
        plain = answer(speaker, item)
    with text_model(given.model, SinkWindow(1, 8), item.shown) as speaker:
        assert answer(speaker, item).means != plain.means
        assert speaker.run is not None
        assert speaker.run.inactive
        assert speaker.active
        assert speaker.reason == ""


def test_the_task_goes_to_other_processes(tmp_path: Path) -> None:
    given = whisper()
    task = from_file(spoken_folder(tmp_path)).on(given.model, given.tokenizer)
    again, item = pickle.loads(cloudpickle.dumps((task, task.item(given.tokenizer, 0, 0))))
    with text_model(given.model, None, item.shown) as speaker:
        sheet = answer(speaker, item)
    assert again.score(item, sheet) == task.score(item, sheet)
    assert repr(again) == repr(task)


@pytest.mark.slow
def test_whisper_makes_no_error_in_a_clear_reading(tmp_path: Path) -> None:
    samples, _ = read_wave(clip("two_cities.wav"), 16_000)
    for name, begin, end, words in (
        ("a", 0.0, 6.42, "It was the best of times, it was the worst of times, it was the age of wisdom,"),
        ("b", 13.08, 18.79, "it was the season of Light, it was the season of Darkness, it was the spring of hope,"),
    ):
        part = samples[int(begin * 16_000) : int(end * 16_000)]
        written(tmp_path / f"{name}.wav", part * 32_767).with_suffix(".txt").write_text(words)
    found = compare(models.speech(), [TempScale(3.0)], [tmp_path], turns=0)
    plain, flat = found.results
    assert (plain.score, plain.prompts) == (0, 2)
    assert flat.score > 0
    assert flat.nats < plain.nats
