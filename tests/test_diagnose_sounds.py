"""A diagnosis of sounds: files and folders, what cannot be read, what is written, and which stretch each word hears."""

from __future__ import annotations

import struct
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.figures import Grid, HeadMap, Listing
from heedful.diagnosis import listening
from heedful.diagnosis.hearing import SoundView
from heedful.diagnosis.listening import CROSS, DECODER, ENCODER
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.sounds import Sound, sounds, writes
from heedful.methods import SinkRate
from heedful.report import page


class Words:
    """A tokenizer that spells every third token as the rest of a word."""

    all_special_ids = (0, 1, 2)
    is_fast = False

    def decode(self, ids: list[int]) -> str:
        return "".join(f"-{i}" if i % 3 == 0 else f" w{i}" for i in ids)


class Reads(WhisperFeatureExtractor):
    """What prepares sound for the tiny model: 20 frames of a hundredth of a second, of 8 pitches."""

    def __init__(self) -> None:
        super().__init__(feature_size=8)
        self.n_samples, self.nb_max_frames = 3200, 20


def loaded(reader: Any = None) -> models.Loaded:
    model = models.tiny("whisper")
    model.generation_config.eos_token_id = 2
    return models.Loaded(model, reader, "us/whisper")


def heard(seed: int = 0) -> Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))


def write(path: Path, seconds: float, rate: int = 16_000) -> Path:
    values = torch.randn(round(seconds * rate), generator=torch.Generator().manual_seed(1)).clamp(-3, 3) * 8000
    with wave.open(str(path), "wb") as file:
        file.setsampwidth(2)
        file.setnchannels(1)
        file.setframerate(rate)
        file.writeframes(struct.pack(f"<{len(values)}h", *values.int().tolist()))
    return path


def test_what_is_written_is_what_generating_writes() -> None:
    model = loaded().model
    places, written, asked = writes(model)(heard())
    assert (places, asked, int(written[0])) == (10, 1, model.config.decoder_start_token_id)
    ids = written[:1].tolist()
    with torch.no_grad():
        while len(ids) < 32:
            new = int(model(input_features=heard()[None], decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if new == 2:
                break
            ids.append(new)
    assert written.tolist() == ids
    assert len(ids) > 3
    model.generation_config.begin_suppress_tokens = [ids[1]]
    assert int(writes(model)(heard())[1][1]) != ids[1]
    model.generation_config.suppress_tokens = ids[1:]
    assert not set(writes(model)(heard())[1][1:].tolist()) & set(ids[1:])
    told = {"lang_to_id": {"<|en|>": 40, "<|de|>": 41}, "task_to_id": {"transcribe": 50}, "no_timestamps_token_id": 60}
    for name, value in told.items():
        setattr(model.generation_config, name, value)
    _, prompted, asked = writes(model)(heard())
    with torch.no_grad():
        first = model(input_features=heard()[None], decoder_input_ids=torch.tensor([[1]])).logits[0, 0]
    assert asked == 4
    assert prompted[:4].tolist() == [1, 40 + int(first[41] > first[40]), 50, 60]


def test_a_view_holds_what_the_maps_hold() -> None:
    given = loaded()
    found = heedful.diagnose(given, torch.stack([heard(), heard(1)]), measures=SinkRate())
    assert (found.facts["texts"], found.facts["reads"]) == (2, "sound")
    view = found.view
    assert isinstance(view, SoundView)
    assert view.kinds == {ENCODER: [0, 1], DECODER: [2, 4], CROSS: [3, 5]}
    written = [writes(given.model)(heard(n))[1] for n in (0, 1)]
    assert found.facts["tokens"] == sum(10 + len(ids) for ids in written)
    model = models.tiny("whisper", attn_implementation="eager")
    with torch.no_grad():
        said = model(
            input_features=heard()[None], decoder_input_ids=written[0][None], output_attentions=True, return_dict=True
        )
    cross = torch.stack(said.cross_attentions)[:, 0]  # [2 h n 10]
    n = len(written[0]) - 1
    assert view.words[0] == [str(i) for i in written[0][1:].tolist()]
    assert (view.unit, view.steps) == ("places", [1.0, 1.0])
    assert close(view.maps[0, 0, :n], cross.mean((0, 1))[:-1].half())
    for which, (layer, head) in enumerate(view.heads, 1):
        assert close(view.maps[0, which, :n], cross[{3: 0, 5: 1}[layer], head, :-1].half())
    assert view.meant == [(layer, head) for layer in (3, 5) for head in range(4)]
    spread = torch.special.entr(torch.stack(said.encoder_attentions)[:, 0]).sum(-1).mean(-1)
    alone = heedful.diagnose(given, heard(), measures=SinkRate()).view
    assert isinstance(alone, SoundView)
    assert close(alone.entropy[:2], spread)
    assert bool(view.silence[[2, 4]].isnan().all())
    assert close(view.silence[[0, 1, 3, 5]], torch.zeros(4, 4))  # nobody knows of any silence


def test_files_of_a_folder_are_cut_and_what_is_bad_is_told(tmp_path: Path) -> None:
    given = loaded(Reads())
    (tmp_path / "clips").mkdir()
    write(tmp_path / "clips" / "a.wav", 0.08)
    (tmp_path / "clips" / "b.wav").write_text("no sound")
    write(tmp_path / "clips" / "c.wav", 0.28)
    (tmp_path / "clips" / "d.wav").write_bytes(b"")
    found = heedful.diagnose(given, tmp_path / "clips", measures=SinkRate())
    assert (found.facts["texts"], found.facts["windows"]) == (2, 3)
    assert [x.rpartition("/")[2].partition(" (")[0] for x in found.facts["skipped"]] == [
        "b.wav is no WAV file of whole numbers",
        "d.wav is no WAV file of whole numbers",
    ]
    assert "2 of 4 sounds left out" in str(found)
    view = found.view
    assert isinstance(view, SoundView)
    assert [name.rpartition("/")[2] for name in view.names] == ["a.wav", "c.wav", "c.wav from 0.2 s"]
    assert view.unit == "s"
    assert view.steps == pytest.approx([0.02] * 3)
    columns = [int((~row[0, 0].isnan()).sum()) for row in view.maps]
    assert columns == [4, 10, 4]  # of ten places: 0.08 s, 0.2 s and 0.08 s of 0.2 s
    assert 0 < float(view.silence[0].mean()) < 1
    with pytest.raises(FieldError, match=r"b\.wav': is no WAV file of whole numbers"):
        heedful.diagnose(given, tmp_path / "clips" / "b.wav")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Path("nowhere"), "no such file or folder"),
        ("nowhere", "takes features of sounds"),
        ([], "takes features of sounds"),
        (torch.ones(8, 20, dtype=torch.long), "takes features of sounds"),
        (torch.zeros(20), "takes features of sounds"),
        (Path("/etc/hostname"), "needs the model's feature extractor"),
        (Path("/etc/ssl"), r"holds no file that ends in \.wav"),
    ],
)
def test_what_is_no_sound_is_a_plain_error(given: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        heedful.diagnose(loaded(), given, measures=SinkRate())


def test_tokens_become_words_with_the_rows_that_wrote_them() -> None:
    sound = Sound(heard(), 1.0, 0.0, 10, torch.tensor([1, 60, 4, 3, 5, 7, 9, 6]), 2)
    assert listening.words_of(sound, Words()) == [("w4-3", [1, 2]), ("w5", [3]), ("w7-9-6", [4, 5, 6])]
    assert listening.words_of(sound, None)[:2] == [("4", [1]), ("3", [2])]


def test_long_sounds_are_kept_as_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "COLUMNS", 4)
    given = loaded()
    found = heedful.diagnose(given, heard(), measures=SinkRate()).view
    monkeypatch.undo()
    fine = heedful.diagnose(given, heard(), measures=SinkRate()).view
    assert isinstance(found, SoundView)
    assert isinstance(fine, SoundView)
    parts = [fine.maps[0, 0, :, i : i + 3].float().sum(-1) for i in (0, 3, 6, 9)]
    assert close(found.maps[0, 0], torch.stack(parts, -1).half())
    assert found.steps == [3.0]
    given.model.generation_config.alignment_heads = [[0, 1], [1, 3], [9, 0]]
    named = heedful.diagnose(given, heard(), measures=SinkRate()).view
    assert isinstance(named, SoundView)
    assert named.meant == [(3, 1), (5, 3)]


def test_the_page_shows_words_over_time_and_a_profile_comes_back(tmp_path: Path) -> None:
    found = heedful.diagnose(loaded(), torch.stack([heard(), heard(1)]), out=tmp_path / "kept")
    figures = found.figures()
    assert isinstance(figures["heard_0"], Grid)
    assert isinstance(figures["heard_silence"], HeadMap)
    kinds = figures["heard_kinds"]
    assert isinstance(kinds, Listing)
    assert [row[0] for row in kinds.rows] == [ENCODER, DECODER, CROSS]
    assert [row[3] is None for row in kinds.rows] == [False, True, False]  # silence is for who hears
    words = figures["heard_words"]
    assert isinstance(words, Listing)
    assert all(isinstance(row[2], float) for row in words.rows)  # as text, 1.12 would be a head's name
    text = page.render(found)
    assert 'href="#sounds"' in text
    assert 'data-plot="heard_1"' in text
    assert 'data-listing="heard_words"' in text
    back = Profile.load(tmp_path / "kept")
    assert isinstance(back.view, SoundView)
    assert isinstance(found.view, SoundView)
    assert torch.equal(back.view.silence.nan_to_num(9), found.view.silence.nan_to_num(9))
    assert (back.view.meant, back.view.words) == (found.view.meant, found.view.words)
    assert page.render(back) == text
    with pytest.raises(FieldError, match="must be those of its sounds, heads and words"):
        SoundView(**{**vars(back.view), "words": [["a"]]})


def test_sounds_are_read_one_by_one() -> None:
    with pytest.raises(FieldError, match="sounds are read one by one"):
        heedful.diagnose(loaded(), torch.stack([heard(), heard(1)]), batch=2, measures=SinkRate())
    rows = sounds([heard(), torch.stack([heard(1), heard(2)])], None, writes(loaded().model))  # type: ignore[list-item]
    assert (len(rows.tokens), rows.texts, rows.of) == (3, 3, (0, 1, 2))


def test_more_may_be_heard_than_is_written() -> None:
    model = models.tiny("whisper", max_source_positions=100)
    found = heedful.diagnose(model, torch.randn(8, 200, generator=torch.Generator().manual_seed(0)))
    assert found.facts["tokens"] > 100
    assert "heard_0" in found.figures()


def test_a_part_without_cross_attention_is_read_and_has_no_view() -> None:
    found = heedful.diagnose(loaded(), heard(), only="model.encoder")
    assert found.view is None
    assert found.facts["layers"] == 2


def test_heads_that_are_known_to_follow_are_named_by_the_decoder_s_layer() -> None:
    given = loaded()
    given.model.generation_config.alignment_heads = [[0, 1], [1, 2]]
    whole = heedful.diagnose(given, heard(), measures=SinkRate()).view
    some = ("model.encoder", "model.decoder.layers.1")
    part = heedful.diagnose(given, heard(), measures=SinkRate(), only=some).view
    assert isinstance(whole, SoundView)
    assert isinstance(part, SoundView)
    assert whole.meant == [(3, 1), (5, 2)]
    assert part.meant == [(3, 2)]  # the only cross-attention that is left, of the decoder's layer 1


@pytest.mark.parametrize(("step", "unit"), [(0.04, "s"), (0.06, "s"), (5.0, "places")])
def test_every_stretch_has_a_name_of_its_own(step: float, unit: str) -> None:
    maps, none = torch.rand(2, 1, 2, 300).half(), torch.zeros(1, 1)
    view = SoundView(
        ["a.wav", "b.wav"], [["so", "so"], []], [step, step], unit, [(0, 0)], [], {}, [0], maps, none, none
    )
    told = {figure.key: figure for figure in view.figures()}
    grid = told["heard_0"]
    assert isinstance(grid, Grid)
    assert len(set(grid.columns)) == 300
    assert "heard_1" not in told  # nothing was written of it
