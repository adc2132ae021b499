"""Comparisons on speech, pictures, questions about pictures, boxes in them, and drawn scenes, with models at hand.

python -m benchmarks.quality.seen [scenes ...] [--minutes 9]     (HF_HUB_OFFLINE=1; it resumes)
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
import wave
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from benchmarks.quality.compared import report
from benchmarks.quality.erasing import Erased
from benchmarks.quality.page import SEEN
from claims import _sight
from claims._pictures import PATCH, SIDE, WORDS, draw
from heedful import models
from heedful.bench.compare import compare
from heedful.core.files import RECORDS
from heedful.diagnosis.waves import read_wave
from heedful.tasks import Task, find

RATE = 16_000
# where a pause begins a new clip of the reading of A Tale of Two Cities, in seconds, and Dickens' words from there on
CLIPS = {
    0.0: "It was the best of times, it was the worst of times, it was the age of wisdom,",
    6.42: "it was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity,",
    13.08: "it was the season of Light, it was the season of Darkness, it was the spring of hope,",
    18.79: "it was the winter of despair, we had everything before us, we had nothing before us, "
    "we were all going direct to",
    25.55: "Heaven, we were all going direct the other way - in short, the period was so far like the present",
    31.82: "period, that some of its noisiest authorities insisted on its being received, for good",
    37.52: "or for evil, in the superlative degree of comparison only.",
}
DIGITS, OF_EACH = 10, 16  # classes, and pictures of each, half of which a head is fitted on
QUESTIONS = {"left-colour": 0, "left-shape": 1, "right-colour": 2, "right-shape": 3}  # and whose word answers each
KINDS = (WORDS[2:6], WORDS[6:10])  # colours, shapes
PICTURES = 60
METHODS = {
    "speech": ["trimmedllama(share=0.25)", "trimmedllama(share=0.05)", "pruneheads(groups=((0,0),(1,1)))",
               "sinkwindow(4,64)"],
    "pictures": ["tome(count=8)", "tome(count=16)", "tome(count=24)", "pruneheads(groups=((0,0),(1,1)))",
                 "sinkwindow(4,64)"],
    "asked": ["snapkv(budget=0.5)", "snapkv(budget=0.25)", "knorm(budget=0.5)", "pruneheads(groups=((4,0),))",
              "sinkwindow(4,16)"],
    "boxes": ["snapkv(budget=0.5)", "snapkv(budget=0.25)", "knorm(budget=0.5)", "pruneheads(groups=((4,0),))",
              "tempscale(0.5)", "sinkwindow(4,16)"],
    "scenes": ["attendandexcite(grid=(8,8))", "conform(grid=(8,8))", "hrv(role='subjects',factor=2.0)",
               "hrv(role='subjects',factor=0.5)", "tempscale(0.5)", "softpag(w=1.0)", "softpag(w=3.0)"],
    "erased": ["attentiveeraser", "attentiveeraser(s=1.0)", "attentiveeraser(role='other')",
               "softpag(w=3.0)", "tempscale(0.5)"],
}  # fmt: skip
Ground = tuple[models.Loaded, list[Task | Path]]


def speech(home: Path) -> Ground:
    """Whisper base, and clips of a reading with their words."""
    path = next(Path(str(f.locate())) for f in files("moonshine-voice") or [] if f.name == "two_cities.wav")
    samples, _ = read_wave(path, RATE)
    begins = [*CLIPS, len(samples) / RATE]
    for (begin, words), end in zip(CLIPS.items(), begins[1:], strict=True):
        part = (samples[int(begin * RATE) : int(end * RATE)] * 32_767).clamp(-32_768, 32_767).int().tolist()
        file = home / f"{begin:05.2f}.wav"
        with wave.open(str(file), "wb") as sound:
            sound.setparams((1, 2, RATE, len(part), "NONE", ""))
            sound.writeframes(struct.pack(f"<{len(part)}h", *part))
        file.with_suffix(".txt").write_text(words)
    return models.speech(), [home]


def pictures(home: Path) -> Ground:
    """DINOv2-S/14, and handwritten digits in folders of their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for kind in range(DIGITS):
        (home / str(kind)).mkdir(parents=True, exist_ok=True)
        for i, dots in enumerate(found.images[found.target == kind][:OF_EACH]):
            image = Image.fromarray((dots * 255 / 16).astype("uint8")).resize((224, 224), Image.Resampling.BICUBIC)
            image.save(home / str(kind) / f"{i}.png")
    return models.vision(), [home]


def asked(home: Path) -> Ground:
    """The small vision-language model of the claims, and questions about pictures that it never saw."""
    words, _ = drawn(home)
    rows = []
    for i, said in enumerate(words):
        for question, place in QUESTIONS.items():
            if (word := WORDS[said[place]]) != "nothing":
                choices = list(KINDS[place % 2])
                rows.append({"image": f"{i}.png", "question": question, "choices": choices, "answer": word})
    return sighted(rows, home / "questions.jsonl")


def boxes(home: Path) -> Ground:
    """The same model, and where in those pictures the thing stands that a question is about."""
    words, covered = drawn(home)
    rows = []
    for i, said in enumerate(words):
        for question, place in QUESTIONS.items():
            if WORDS[said[place]] != "nothing":
                down, across = covered[i, place // 2].nonzero().unbind(-1)
                box = [int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1]
                rows.append({"image": f"{i}.png", "question": question, "box": box})
    return sighted(rows, home / "boxes.jsonl")


def drawn(home: Path) -> tuple[list[list[int]], torch.Tensor]:
    """Pictures in a folder, their words, and where each thing stands, `[n 2 16 16]`."""
    shown, words, covered = draw(PICTURES, torch.Generator().manual_seed(77))
    for i, picture in enumerate(shown):
        dots = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(dots).save(home / f"{i}.png")
    return words.tolist(), covered


def sighted(rows: list[dict[str, Any]], file: Path) -> Ground:
    """The small vision-language model of the claims, and rows to ask it."""
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return models.Loaded(_sight.model(), reader(), "the small vision-language model of the claims"), [file]


def reader() -> Any:
    """What prepares pictures and words for that model."""
    names = [word or "<>" for word in WORDS] + [*QUESTIONS, "ground?", "<s>", "<image>"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", additional_special_tokens=["<image>"])
    size: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    seen = CLIPImageProcessor(**size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        seen, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="<s> <image> {{ messages[0]['content'][1]['text'] }}",
    )  # fmt: skip


def scenes(home: Path) -> Ground:
    """The small denoiser that comes along, scenes of two things, and their words."""
    return models.denoiser(), [find("scenes"), find("scene_words")]


def erased(home: Path) -> Ground:
    """The same, and scenes of which a thing is taken out."""
    return models.denoiser(), [Erased()]


GROUNDS = {"speech": speech, "pictures": pictures, "asked": asked, "boxes": boxes, "scenes": scenes, "erased": erased}


def measured(ground: str, minutes: float, turns: int) -> None:
    """One comparison, its record and its page."""
    home = Path(tempfile.gettempdir()) / f"heedful-seen-{ground}"
    (home / ground).mkdir(parents=True, exist_ok=True)
    os.chdir(home)  # records name the folder, and not where it lay
    loaded, tasks = GROUNDS[ground](Path(ground))
    found = compare(loaded, METHODS[ground], tasks, out="kept", minutes=minutes, turns=turns, progress=report)
    found.save(SEEN[ground])
    print(found)
    print(f"the page: {found.page(home / 'page.html')}")
    (home / "kept" / RECORDS).unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.seen")
    parser.add_argument("grounds", nargs="*", choices=list(GROUNDS), help="all where none is named")
    parser.add_argument("--minutes", type=float, default=9, help="of asking")
    parser.add_argument("--turns", type=int, default=3, help="that costs are measured")
    given = parser.parse_args()
    for each in given.grounds or GROUNDS:
        measured(each, given.minutes, given.turns)
