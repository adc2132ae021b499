"""Sound files as samples, and what is wrong with some."""

from __future__ import annotations

import math
import struct
import wave
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.diagnosis import waves
from heedful.diagnosis.waves import read_wave, resampled


def write(path: Path, data: bytes, width: int = 2, channels: int = 1, rate: int = 16_000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setsampwidth(width)
        file.setnchannels(channels)
        file.setframerate(rate)
        file.writeframes(data)
    return path


def tone(pitch: float, rate: int, seconds: float = 0.5) -> Tensor:
    return torch.sin(2 * math.pi * pitch * torch.arange(round(rate * seconds), dtype=torch.float64) / rate).float()


@pytest.mark.parametrize(
    ("width", "data", "values"),
    [
        (1, bytes([0, 128, 192]), [-1.0, 0.0, 0.5]),
        (2, struct.pack("<3h", -32768, 0, 16384), [-1.0, 0.0, 0.5]),
        (3, bytes([0, 0, 0x80, 0, 0, 0, 0, 0, 0x40]), [-1.0, 0.0, 0.5]),
        (4, struct.pack("<3i", -(2**31), 0, 2**30), [-1.0, 0.0, 0.5]),
    ],
)
def test_samples_of_any_width(width: int, data: bytes, values: list[float], tmp_path: Path) -> None:
    samples, why = read_wave(write(tmp_path / "x.wav", data, width), 16_000)
    assert not why
    assert torch.equal(samples, torch.tensor(values))


def test_channels_are_taken_in_the_mean(tmp_path: Path) -> None:
    data = struct.pack("<4h", 16384, 0, -16384, 16384)
    assert read_wave(write(tmp_path / "x.wav", data, channels=2), 16_000)[0].tolist() == [0.25, 0.0]


@pytest.mark.parametrize(("own", "rate"), [(48_000, 16_000), (44_100, 16_000), (8_000, 16_000), (22_050, 48_000)])
def test_a_tone_keeps_its_pitch_at_another_rate(own: int, rate: int) -> None:
    found, there = resampled(tone(440, own), own, rate), tone(440, rate)
    assert len(found) == len(there)
    inside = slice(rate // 50, -rate // 50)  # the ends are cut
    assert float((found - there)[inside].abs().max()) < 2e-3


def test_what_a_lower_rate_cannot_hold_is_gone() -> None:
    found = resampled(tone(12_000, 48_000), 48_000, 16_000)
    assert float(found[320:-320].abs().max()) < 1e-2
    assert close(resampled(tone(440, 16_000), 16_000, 16_000), tone(440, 16_000))


def test_kernels_of_an_odd_rate_are_held_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resampled(tone(440, 1_127), 1_127, 1_600)
    made: list[int] = []
    sinc = torch.sinc
    monkeypatch.setattr(torch, "sinc", lambda x: made.append(x.numel()) or sinc(x))
    monkeypatch.setattr(waves, "AT_ONCE", 1 << 18)
    assert close(resampled(tone(440, 1_127), 1_127, 1_600), whole)
    assert max(made) <= 1 << 18 < sum(made)


def test_a_rate_of_no_sound_is_told(tmp_path: Path) -> None:
    for rate in (10, 2_000_000_000):
        samples, why = read_wave(write(tmp_path / "x.wav", bytes(200), rate=rate), 16_000)
        assert not len(samples)
        assert why == f"tells a rate of {rate:,} Hz, at which no sound is kept"


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", bytes(200)).read_bytes()
    floats = good[:20] + struct.pack("<H", 3) + good[22:]
    for name, data, why in (
        ("empty", b"", "is no WAV file of whole numbers"),
        ("text", b"no sound, but words", "is no WAV file of whole numbers"),
        ("floats", floats, "is no WAV file of whole numbers (unknown format: 3)"),
        ("half", good[:100], "ends before all the sound that it announces"),
    ):
        (tmp_path / f"{name}.wav").write_bytes(data)
        samples, told = read_wave(tmp_path / f"{name}.wav", 16_000)
        assert not len(samples)
        assert told.startswith(why), name
    assert read_wave(write(tmp_path / "none.wav", b""), 16_000)[1] == "holds no sound"
    assert read_wave(tmp_path, 16_000)[1] == "cannot be read (Is a directory)"
