"""The view of sounds: when each written word is heard, and what three kinds of attention do with the silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from heedful.core.errors import FieldError
from heedful.core.figures import Figure, Grid, Head, HeadMap, Listing, head_name, percent

MOST_WORDS = 40  # of a sound that the page lists


@dataclass(frozen=True, eq=False)
class SoundView:
    """A few sounds, the words written of them, and when heads hear each. Map 0 is the mean, then come `heads`."""

    names: list[str]  # of the sounds
    words: list[list[str]]
    steps: list[float]  # how long a stretch of each sound is
    unit: str  # "s", or "places" where nobody knows how long a place lasts
    meant: list[Head]  # those of which the mean is told
    heads: list[Head]
    kinds: dict[str, list[int]]  # the layers of each kind of attention
    layers: list[int]  # those of `silence` and `entropy`
    maps: Tensor  # float16 [sounds 1+heads words stretches]; nan beyond a sound's words and its end
    silence: Tensor  # [layers h]: the share spent behind the end of the sound; nan where the sound is not looked at
    entropy: Tensor  # [layers h], in nats

    def __post_init__(self) -> None:
        good = (len(self.names), 1 + len(self.heads), max(map(len, self.words), default=0))
        if self.maps.shape[:3] != good or not len(self.words) == len(self.steps) == len(self.names):
            raise FieldError(self, "maps", tuple(self.maps.shape), "must be those of its sounds, heads and words", good)
        if len(self.silence) != len(self.layers) or self.silence.shape != self.entropy.shape:
            rule = "silence and entropy must be those of its layers"
            raise FieldError(self, "silence", tuple(self.silence.shape), rule, (len(self.layers), 8))

    def figures(self) -> Iterator[Figure]:
        """Words over time for each sound, the same by single heads for the first, and the kinds of attention."""
        mean = f"The mean of heads {', '.join(head_name(*head) for head in self.meant)}"
        for i, name in enumerate(self.names):
            if self.words[i]:
                yield self._grid(f"heard_{i}", name.rpartition("/")[2], mean, i, 0)
        for n, head in enumerate(self.heads if self.words[0] else (), 1):
            yield self._grid(f"heard_by_{head_name(*head)}", f"head {head_name(*head)}", "This head alone", 0, n)
        yield self._listing()
        what = "The share of its attention that a head spends on the silence behind the end of a sound."
        yield HeadMap("heard_silence", "Attention to silence", what, self.layers, self.silence, low=0.0)
        at = {kind: [self.layers.index(n) for n in mine if n in self.layers] for kind, mine in self.kinds.items()}
        rows = [
            (kind, ", ".join(str(self.layers[n]) for n in mine), float(self.entropy[mine].nanmean()), _told(self, mine))
            for kind, mine in at.items()
            if mine
        ]
        what = "The heads of each kind in the mean: how spread their attention is, and how much of it goes to silence."
        columns = ("attention of the", "layers", "entropy in nats", "share on silence")
        yield Listing("heard_kinds", "Three kinds of attention", what, columns, rows)

    def _grid(self, key: str, title: str, whose: str, sound: int, which: int) -> Grid:
        words, step = self.words[sound], self.steps[sound]
        values = self.maps[sound, which, : len(words)].float()
        values = values[:, ~values.isnan().all(0)]
        rows = [f"{n} {word}" for n, word in enumerate(words, 1)]
        columns = [f"{step * n:.2f}" if self.unit == "s" else f"{step * n:.0f}" for n in range(values.shape[1])]
        label = "second" if self.unit == "s" else "place"
        what = f"{whose}: how much it attends to each stretch of the sound while it writes each word."
        return Grid(key, f"When words are heard: {title}", what, values, rows, columns, "word", label, "share")

    def _listing(self) -> Listing:
        rows: list[tuple[object, ...]] = []
        for i, name in enumerate(self.names):
            for n, word in enumerate(self.words[i][:MOST_WORDS]):
                row = self.maps[i, 0, n].float().nan_to_num()
                peak = int(row.argmax())
                rows.append((name.rpartition("/")[2], word, round(peak * self.steps[i], 2), percent(float(row[peak]))))
        label = "second" if self.unit == "s" else "place"
        what = "Each word with the stretch of its sound that gets most attention while it is written, in the mean."
        return Listing("heard_words", "Words and when they are heard", what, ("sound", "word", label, "share"), rows)


def _told(view: SoundView, mine: list[int]) -> str | None:
    found = view.silence[mine]
    return None if bool(found.isnan().all()) else percent(float(found.nanmean()))
