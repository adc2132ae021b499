"""Tiny pictures, sounds and processors for tasks of them."""

from __future__ import annotations

import json
import struct
import wave
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    WhisperFeatureExtractor,
)

from heedful import models

PLACE = "<image>"


def painted(path: Path, colour: tuple[int, int, int], seed: int = 0) -> Path:
    """A picture of 8 x 8 dots of about one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(-20, 21, (8, 8, 3), generator=torch.Generator().manual_seed(seed))
    dots = (torch.tensor(colour) + noise).clamp(0, 255).byte()
    Image.fromarray(dots.numpy()).save(path)
    return path


def folders(home: Path, count: int = 4) -> Path:
    """Pictures of two classes, each in a folder of its own."""
    for kind, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        for i in range(count):
            painted(home / kind / f"{i}.png", colour, i)
    return home


def sound(path: Path, seconds: float = 0.1, seed: int = 0) -> Path:
    """A WAV file of noise."""
    values = torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * 8000
    return written(path, values)


def written(path: Path, values: torch.Tensor) -> Path:
    """A WAV file of samples of two bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, len(values), "NONE", ""))
        file.writeframes(struct.pack(f"<{len(values)}h", *values.clamp(-32_768, 32_767).int().tolist()))
    return path


def spoken_folder(home: Path, count: int = 3) -> Path:
    """Sounds, each with its words beside it."""
    for i in range(count):
        sound(home / f"{i}.wav", seed=i).with_suffix(".txt").write_text(f"One, two; number w{40 + i}!")
    return home


class Words:
    """A tokenizer of words such as w40, each a token; any other word is number 3."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        words = [word.strip(".,;!") for word in text.split()]
        return [int(word[1:]) if word[1:].isdigit() else 3 for word in words]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(f" w{i}" for i in ids if i > 2 or not skip_special_tokens)


class Extractor(WhisperFeatureExtractor):
    """What prepares sound for the tiny model: 20 frames of a hundredth of a second, of 8 pitches."""

    def __init__(self) -> None:
        super().__init__(feature_size=8)
        self.n_samples, self.nb_max_frames = 3200, 20


class SoundReader(Words):
    """Sounds and words, as a processor has them."""

    def __init__(self) -> None:
        self.feature_extractor, self.tokenizer = Extractor(), Words()


def whisper() -> models.Loaded:
    model = models.tiny("whisper")
    model.generation_config.eos_token_id, model.config.max_target_positions = 2, 12  # it writes six tokens
    return models.Loaded(model, SoundReader(), "tiny:whisper")


def image_reader() -> Any:
    return ViTImageProcessor(size={"height": 8, "width": 8})


def vit() -> models.Loaded:
    """A classifier of four classes."""
    model = models.tiny("vit")
    model.config.id2label = {0: "Red", 1: "navy-blue, blue"}
    return models.Loaded(model, image_reader(), "tiny:vit")


def llava(template: str | None = None) -> models.Loaded:
    """The tiny model that reads pictures and words, with a processor of its own."""
    model = models.tiny("llava")
    config = model.config
    known = {f"w{i}": i for i in range(config.text_config.vocab_size)}
    words = ("red", "blue", "yes", "no", "Question:", "Answer:")
    known = {word: i for word, i in known.items() if i not in (*range(20, 20 + len(words)), config.image_token_id)}
    known |= {word: 20 + i for i, word in enumerate(words)} | {PLACE: config.image_token_id}
    backend = Tokenizer(WordLevel(known, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_of = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=[PLACE])
    size = config.vision_config.image_size
    seen = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaProcessor(
        seen, words_of, patch_size=config.vision_config.patch_size, num_additional_image_tokens=1,
        vision_feature_select_strategy=config.vision_feature_select_strategy, chat_template=template,
    )  # fmt: skip
    return models.Loaded(model, processor, "tiny:llava")


def rows(path: Path, found: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in found) + "\n")
    return path
