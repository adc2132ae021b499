"""Sound files as samples: WAV files of whole numbers, as the standard library reads them, at the rate a model takes."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import torch
from torch import Tensor

from heedful.core.errors import first_line

ENDINGS = (".wav", ".wave")
REACH = 24  # zero crossings of the sinc to each side: what is lost lies within 2 % of the highest pitch that is kept
KEPT = 0.98  # of the pitches that the lower rate can hold
RATES = range(1_000, 1_000_001)  # samples a second
AT_ONCE = 1 << 22  # numbers of the kernels that are held at once: rates that share no divisor have many


def read_wave(path: Path, rate: int) -> tuple[Tensor, str]:
    """The samples of a file `[n]` from -1 to 1, its channels in the mean, and why there are none."""
    try:
        with wave.open(str(path)) as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            told, data = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        return torch.zeros(0), f"is no WAV file of whole numbers ({first_line(error)})"
    except OSError as error:
        return torch.zeros(0), f"cannot be read ({error.strerror})"
    if len(data) != told * channels * width:
        return torch.zeros(0), "ends before all the sound that it announces"
    if not data:
        return torch.zeros(0), "holds no sound"
    if own not in RATES:
        return torch.zeros(0), f"tells a rate of {own:,} Hz, at which no sound is kept"
    return resampled(_numbers(data, width).reshape(-1, channels).mean(1), own, rate), ""


def _numbers(data: bytes, width: int) -> Tensor:
    """Samples of 1 to 4 bytes, the lowest first; those of one byte are counted from 0, others have a sign."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if width == 1:
        return (raw.float() - 128) / 128
    parts = raw.reshape(-1, width).double()
    whole = (parts * 256.0 ** torch.arange(width)).sum(1)
    return (torch.where(parts[:, -1] > 127, whole - 256.0**width, whole) / (256.0**width / 2)).float()


def resampled(samples: Tensor, own: int, rate: int) -> Tensor:
    """The same sound `[n]` at another rate: between samples it is what a sinc under a Hann window says."""
    if own == rate:
        return samples
    shared = math.gcd(own, rate)
    before, after = own // shared, rate // shared
    base = KEPT * min(before, after)
    wide = math.ceil(REACH * before / base)
    places = torch.arange(-wide, wide + before, dtype=torch.float64) / before
    padded = torch.nn.functional.pad(samples[None, None], (wide, wide + before))
    found = []
    for phases in torch.arange(after, dtype=torch.float64).split(max(1, AT_ONCE // len(places))):
        at = ((places - phases[:, None] / after) * base).clamp(-REACH, REACH)
        kernels = torch.sinc(at) * (at * math.pi / REACH / 2).cos() ** 2 * base / before
        found.append(torch.nn.functional.conv1d(padded, kernels.float()[:, None], stride=before)[0])
    return torch.cat(found).T.flatten()[: math.ceil(len(samples) * after / before)]
