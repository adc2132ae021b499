"""Sounds as a user has them, as a model hears them: stretches of its length, and the words that it writes down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import FeatureExtractionMixin

from heedful.adapters.cache_name import CACHE, cache_of
from heedful.adapters.wrapped import device_of
from heedful.core.errors import Code, FieldError
from heedful.diagnosis.gathering import Gathering
from heedful.diagnosis.texts import Source, Texts, Windows
from heedful.diagnosis.waves import ENDINGS, read_wave
from heedful.shown import Writing

MOST = 448  # tokens that are written, where a model knows no bound


@dataclass(frozen=True, eq=False)
class Sound:
    """What the encoder hears, and what the decoder wrote of it."""

    features: Tensor  # [channels frames]
    share: float  # of the frames that hold sound; behind it is silence, which the model's reader put there
    seconds: float  # that all frames last; 0 where nobody knows
    places: int  # that the encoder makes of the frames
    written: Tensor  # [n]: token ids, those that ask for a text first
    asked: int  # how many of these ask


Writes = Callable[[Tensor], tuple[int, Tensor, int]]  # of features: places, token ids, and how many of these ask
Stretch = tuple[Tensor, float, float]  # features, the share of them that holds sound, seconds


def sounds(given: Texts, reader: Any, write: Writes) -> Windows:
    """Each stretch of sound a window of its own; files as the model's own `reader` prepares them.

    A file of a folder that cannot be read is left out, and told; one that is named is an error.
    """
    rows: list[Sound] = []
    names: list[str] = []
    of: list[int] = []
    skipped: list[str] = []
    texts = 0
    for source, stretches in SOUNDS.each(given, reader):
        if source.unread:
            skipped.append(f"{source.name} {source.unread}")
            continue
        for n, (features, share, seconds) in enumerate(stretches):
            rows.append(Sound(features, share, seconds, *write(features)))
            names.append(f"{source.name} from {n * seconds:.3g} s" if n else source.name)
            of.append(texts)
        texts += 1
    if not rows:
        raise SOUNDS.nothing(given, skipped)
    return Windows(tuple(rows), Source(names[0]), texts, 0, tuple(skipped), tuple(of), tuple(names))


def extractor_of(reader: Any, owner: str = "diagnose()") -> Any:
    """What turns samples into features for the model, alone or in a processor of sounds and text."""
    found = getattr(reader, "feature_extractor", reader)
    if not isinstance(found, FeatureExtractionMixin) or not hasattr(found, "sampling_rate"):
        rule = (
            "reading sound files needs the model's feature extractor, and the model came without one: save it beside "
            "the model with processor.save_pretrained(folder), or pass it"
        )
        raise FieldError(owner, "tokenizer", reader, rule, Code("AutoProcessor.from_pretrained(...)"))
    return found


def _stretches(samples: Tensor, prepare: Any) -> list[Stretch]:
    """A sound in stretches that the model hears at once; all of it where it hears any length."""
    size = getattr(prepare, "n_samples", None) or len(samples)
    rate = prepare.sampling_rate
    out = []
    for part in samples.split(size):
        features = prepare(part.numpy(), sampling_rate=rate, return_tensors="pt")["input_features"]
        out.append((torch.as_tensor(features)[0], len(part) / size, size / rate))
    return out


def writes(model: Any) -> Writes:
    """What writes down what a model hears: the likeliest token each time, until it ends or half its places are full."""
    how = writing(model)

    @torch.no_grad()
    def write(features: Tensor) -> tuple[int, Tensor, int]:
        heard = _heard(model, features)
        ids = _asking(model, heard)
        asked, new, cache = len(ids), ids, None
        while len(ids) < how.most:
            scores, cache = _next_scores(model, heard, new, cache)
            new = [how.next(scores, first=len(ids) == asked)]
            if new[0] in how.ends:
                break
            ids = [*ids, *new]
        return heard[0].shape[1], torch.tensor(ids), asked

    return write


def writing(model: Any) -> Writing:
    """How a model writes down what it hears, by its own settings; half its places are for it."""
    told, config = model.generation_config, model.config
    never, begin = (
        tuple(i for i in getattr(told, name, None) or () if i < config.vocab_size)  # Whisper's stand in any such config
        for name in ("suppress_tokens", "begin_suppress_tokens")
    )
    end = told.eos_token_id if isinstance(told.eos_token_id, list) else [told.eos_token_id]
    return Writing(getattr(config, "max_target_positions", MOST) // 2, tuple(end), never, begin)


@torch.no_grad()
def asking(model: Any, features: Tensor) -> tuple[list[int], int]:
    """The tokens that ask for a text, in the language that the model hears, and how many places it makes of a sound."""
    heard = _heard(model, features)
    return _asking(model, heard), heard[0].shape[1]


def _heard(model: Any, features: Tensor) -> Any:
    return model.get_encoder()(features[None].to(device_of(model), model.dtype), return_dict=True)


def _next_scores(model: Any, heard: Any, ids: list[int], cache: Any) -> tuple[Tensor, Any]:
    new = torch.tensor([ids], device=heard[0].device)
    said = model(encoder_outputs=heard, decoder_input_ids=new, use_cache=True, **{CACHE: cache})
    return said.logits[0, -1].float(), cache_of(said)


def _asking(model: Any, heard: Any) -> list[int]:
    told, ids = model.generation_config, [model.config.decoder_start_token_id]
    if languages := getattr(told, "lang_to_id", None):
        known = sorted(languages.values())
        scores = _next_scores(model, heard, ids, None)[0][known]
        ids += [known[int(scores.argmax())], told.task_to_id["transcribe"]]
    if (untimed := getattr(told, "no_timestamps_token_id", None)) is not None:
        ids.append(untimed)
    return ids


def _reads(reader: Any) -> Callable[[Path], tuple[list[Stretch], str]]:
    prepare = extractor_of(reader)

    def read(path: Path) -> tuple[list[Stretch], str]:
        samples, why = read_wave(path, prepare.sampling_rate)
        return [] if why else _stretches(samples, prepare), why

    return read


def _features(given: Tensor) -> list[Stretch] | None:
    if given.ndim not in (2, 3) or not given.is_floating_point() or not given.numel():
        return None
    return [(one, 1.0, 0.0) for one in (given if given.ndim == 3 else given[None])]


SOUNDS = Gathering(
    "sound", ENDINGS, "clips",
    "a model that hears takes features of sounds, [channels frames], a batch [b channels frames], WAV files or folders "
    "of them, as Path, or a list of these",
    "extractor(samples, sampling_rate=16_000, return_tensors='pt').input_features, or Path('clips')",
    _reads, _features,
)  # fmt: skip
