"""A task from sounds of the user's own: speech that is written down, and the share of words that are wrong in it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from heedful.core.errors import FieldError, RefusedModel
from heedful.core.files import file_digest
from heedful.core.kinds.loaded import words_of
from heedful.core.kinds.tokens import Prompt
from heedful.diagnosis.sounds import asking, extractor_of, writing
from heedful.diagnosis.texts import files_in, read_text
from heedful.diagnosis.waves import ENDINGS, read_wave
from heedful.explaining.aim import read_by
from heedful.shown import Shown, Writing
from heedful.tasks._own import Given, unbound
from heedful.tasks.task import Item, Sheet, Tokenizer

RATE = 16_000  # at which a sound is looked at before a model says its own


@dataclass(frozen=True)
class Clip:
    """A sound, and what is said in it."""

    name: str  # of its file, within the folder
    words: str
    digest: str  # of the sound


@dataclass(frozen=True, eq=False)
class Hearing:
    """What the task knows of the model that is asked."""

    tokenizer: Any
    prompt: tuple[int, ...]  # the tokens that ask for a text
    places: int  # that its encoder makes of a sound
    how: Writing


class OwnSpeech(Given):
    """Sounds of the user's own, each with the words that are said in it; the model writes down what it hears.

    The score is the word error rate of each sound, and its mean over sounds: words that have to be put in, taken out
    or exchanged, as a share of the words that are said. Case and punctuation do not count. A sound of which nothing is
    written scores 1, which is what guessing stands for here.
    """

    name = "own speech"
    about = "Word error rate of speech of your own, without case and punctuation; writing nothing has all words wrong."
    unit = "share of words wrong"
    more_is_better = False
    hearing: Hearing | None = None

    def require(self, model: Any, tokenizer: Any) -> None:
        if read_by(model) != "sound":
            raise RefusedModel(
                f"{self.title} holds sounds to write down, and {type(model).__name__} does not write down what it "
                "hears; name a model such as Whisper: heedful compare speech"
            )
        extractor_of(tokenizer, "compare()")
        if not hasattr(tokenizer, "decode"):
            rule = "prepares sounds and spells no words, which are compared"
            raise FieldError("compare()", "tokenizer", type(tokenizer).__name__, rule, "AutoProcessor.from_pretrained")

    def on(self, model: Any, tokenizer: Any) -> Self:
        """The same without sounds that are longer than the model hears at once.

        The language is that which the model, as it is, hears in the first one.
        """
        prepare = extractor_of(tokenizer)
        rate, most = prepare.sampling_rate, getattr(prepare, "n_samples", None)
        sizes = {clip: len(read_wave(Path(self.source) / clip.name, rate)[0]) for clip in self.rows}
        fit = tuple(clip for clip in self.rows if most is None or sizes[clip] <= most)
        long = [
            f"{clip.name}: lasts {size / rate:.3g} s, and the model hears {most / rate:.3g} s at once; cut it"
            for clip, size in sizes.items()
            if most is not None and size > most
        ]
        if not fit:
            raise FieldError("compare()", "tasks", self.source, long[0], "a folder of shorter sounds")
        prompt, places = asking(model, self._features(fit[0], tokenizer)[0])
        how = writing(model)
        known = Hearing(tokenizer, tuple(prompt), places, replace(how, most=how.most - len(prompt)))
        return replace(self, rows=fit, left_out=(*self.left_out, *long), hearing=known)

    @property
    def _known(self) -> Hearing:
        if self.hearing is None:
            raise unbound(self)
        return self.hearing

    def _features(self, clip: Clip, tokenizer: Any) -> torch.Tensor:
        """What the model is given of a sound, `[1 channels frames]`."""
        prepare = extractor_of(tokenizer)
        samples, why = read_wave(Path(self.source) / clip.name, prepare.sampling_rate)
        if why:
            raise FieldError("compare()", "tasks", clip.name, f"was read before, and now {why}", "files that stay")
        heard = prepare(samples.numpy(), sampling_rate=prepare.sampling_rate, return_tensors="pt")
        return torch.as_tensor(heard["input_features"])

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        known = self._known
        clip = self.rows[self.place(tokenizer, number, seed)]
        shown = Shown({"input_features": self._features(clip, tokenizer)}, "sound", known.places)
        option = tuple(words_of(known.tokenizer).encode(f" {clip.words}", add_special_tokens=False))
        labels: dict[str, float | str] = {"said": clip.words, "words": len(spoken(clip.words))}
        return Item(Prompt(known.prompt), (option,), labels=labels, shown=shown, writes=known.how)

    def score(self, item: Item, sheet: Sheet) -> float:
        written = self._known.tokenizer.decode(list(sheet.said), skip_special_tokens=True)
        return word_errors(str(item.labels["said"]), written)

    def chance(self, item: Item) -> float:
        return 1.0


def spoken(text: str) -> list[str]:
    """The words of a text as they are compared: one case, no punctuation, no symbols."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in plain if unicodedata.category(letter)[0] not in "PS").split()


def word_errors(said: str, written: str) -> float:
    """The word error rate: the fewest words to put in, take out or exchange, over the words that are said."""
    right, found = spoken(said), spoken(written)
    row = list(range(len(found) + 1))  # errors up to each written word, of no word said so far
    for i, word in enumerate(right, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1] / len(right)


def clips(folder: Path) -> Iterator[tuple[str, Clip | str]]:
    """The sounds of a folder with their words, or why one cannot be asked."""
    texts = {file.with_suffix(""): file for file in files_in(folder, (".txt",))}
    for file in files_in(folder, ENDINGS):
        name, beside = str(file.relative_to(folder)), texts.get(file.with_suffix(""))
        if beside is None:
            yield name, f"has no {file.stem}.txt beside it, which tells the words that are said"
            continue
        words, why = read_text(beside)
        if why or not spoken(words):
            yield name, f"{beside.name} {why or 'holds no words'}"
            continue
        _, why = read_wave(file, RATE)
        yield name, why or Clip(name, " ".join(words.split()), file_digest(file)[:16])
