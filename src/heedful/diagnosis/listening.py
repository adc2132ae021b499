"""What is read for the view of sounds: each sound alone, its words, and the stretches that they attend to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heedful.adapters.choosing import adapter_for
from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.figures import Head
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.core.summary import Summary, sums
from heedful.diagnosis.hearing import SoundView
from heedful.diagnosis.sounds import Sound
from heedful.diagnosis.texts import Windows
from heedful.diagnosis.view import Attended

if TYPE_CHECKING:
    from heedful.diagnosis.subject import Subject

MOST_SOUNDS, MOST_HEADS = 4, 4
COLUMNS = 300  # stretches of a sound at most for which attention is told
ENCODER, DECODER, CROSS = "encoder", "decoder, to itself", "decoder, to the sound"


class Shares(Method):
    """How much of its attention each head spends behind the end of the sound, and how spread it is."""

    paper = Attended.paper
    heard: int  # places that hold sound

    @sums("received", "entropy")
    def share(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.received is None or pattern.entropy is None:
            return None
        spent = pattern.received[0, :, self.heard :].sum(-1) / pattern.received[0].sum(-1)
        return Cat({"silence": spent.float(), "entropy": pattern.entropy[0].float().mean(-1)})  # each [h]

    def answer(self, readings: Readings) -> dict[int, dict[str, Tensor]]:
        return {layer: {name: x.cpu() for name, x in stat.tensors().items()} for layer, stat in readings.items()}


class Heard(Method):
    """How much each written token attends to each stretch of the sound, for every head that looks at it."""

    paper = Attended.paper
    tokens: int  # that are written
    heard: int  # places that hold sound
    side: int  # places of one stretch

    def idle(self, call: Call) -> bool:
        return not call.cross

    @reads(Site.PATTERN, first="tokens")
    def look(self, weights: Tensor, call: Call) -> Statistic:
        weights = weights[0].float()
        place = call.keys.index[0, 0]
        among = place < self.heard
        found = weights.new_zeros(*weights.shape[:2], -(-self.heard // self.side))
        found.index_add_(2, place[among] // self.side, weights[..., among])
        return Cat.of(f"{call.rows.start or 0:09d}", found)

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        parts = {layer: sorted(stat.tensors().items()) for layer, stat in readings.items()}
        return {layer: torch.cat([x.cpu() for _, x in rows], 1) for layer, rows in parts.items()}  # [h r stretches]


def columns_of(sound: Sound) -> tuple[int, int]:
    """How many of the encoder's places hold sound, and how many of them one stretch has."""
    heard = max(1, round(sound.share * sound.places))
    return heard, -(-heard // COLUMNS)


def kinds_of(model: Any, layers: Sequence[str], cross: set[int]) -> dict[str, list[int]]:
    """The layers of each kind of attention, told by where they stand and by what they look at."""
    decoder = model.get_decoder()
    (inside,) = (f"{name}." for name, module in model.named_modules() if module is decoder)
    own = [n for n, name in enumerate(layers) if name.startswith(inside)]
    kinds = {ENCODER: [n for n in range(len(layers)) if n not in own]}
    return kinds | {DECODER: [n for n in own if n not in cross], CROSS: [n for n in own if n in cross]}


def words_of(sound: Sound, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """What was written, word by word, each with the rows that wrote it: those of the tokens before its own."""
    ids = sound.written[sound.asked :].tolist()
    rows = range(sound.asked - 1, len(sound.written) - 1)
    if tokenizer is None:
        return [(str(i), [row]) for i, row in zip(ids, rows, strict=True)]
    found: list[tuple[list[int], list[int]]] = []
    for i, row in zip(ids, rows, strict=True):
        piece = tokenizer.decode([i])
        if not found or piece.startswith(" "):
            found.append(([], []))
        found[-1][0].append(i)
        found[-1][1].append(row)
    return [(tokenizer.decode(mine).strip(), at) for mine, at in found]


def timed(model: Any, layers: Sequence[str], cross: list[int], found: Mapping[int, Tensor]) -> list[Head]:
    """The heads that are known to follow the sound, as the model's own settings name them; all where they name none."""
    told = getattr(model.generation_config, "alignment_heads", None)
    every = [(n, h) for n in cross if n in found for h in range(len(found[n]))]
    of_decoder = {int(re.findall(r"\d+", layers[n])[-1]): n for n in cross}  # some may be left out of the run
    named = [(of_decoder[i], h) for i, h in told or () if i in of_decoder]
    return [head for head in named if head in every] or every


def look(subject: Subject, windows: Windows) -> SoundView | None:
    """The view of the first sounds, each read alone: what the decoder looks at while it writes, kept as stretches.

    None where no layer that is read looks from the words at the sound.
    """
    layers = adapter_for(subject.model, subject.how.get("only")).layer_names
    heard, shares = [], []
    few = windows.tokens[:MOST_SOUNDS]
    for name, sound in zip(windows.names, few, strict=False):
        count, side = columns_of(sound)
        parts = Shares(count), Heard(len(sound.written), count, side)
        with subject.attach(Stack(parts)) as run:
            subject.read(run, (sound,))
            if parts[1] not in run.answers():
                return None
            shares.append(run[parts[0]])
            heard.append((name, sound, words_of(sound, subject.words), side, run[parts[1]]))
    with torch.autocast("cpu", enabled=False):  # as in the other views
        return view_of(subject.model, layers, heard, shares)


def view_of(
    model: Any,
    layers: Sequence[str],
    heard: Sequence[tuple[str, Sound, list[tuple[str, list[int]]], int, Mapping[int, Tensor]]],
    shares: Sequence[Mapping[int, Mapping[str, Tensor]]],
) -> SoundView:
    """The view of these sounds: name, sound, words, places of a stretch, and maps by layer; what `Shares` tells."""
    kinds = kinds_of(model, layers, set(heard[0][4]))
    meant = timed(model, layers, kinds[CROSS], heard[0][4])
    numbers = sorted(shares[0])
    widest = max(len(shares[0][n]["entropy"]) for n in numbers)

    def table(name: str) -> Tensor:
        rows = [torch.stack([one[n][name] for one in shares]).mean(0) for n in numbers]
        return torch.stack([torch.nn.functional.pad(x, (0, widest - len(x)), value=torch.nan) for x in rows])

    silence, entropy = table("silence"), table("entropy")
    silence[[n in kinds[DECODER] for n in numbers]] = torch.nan
    every = [(n, h) for n in kinds[CROSS] for h in range(len(heard[0][4][n]))]
    sharp = sorted(every, key=lambda head: float(entropy[numbers.index(head[0]), head[1]]))[:MOST_HEADS]
    maps = []
    for _, _, words, _, found in heard:
        ways = [torch.stack([found[n][h] for n, h in meant]).mean(0), *(found[n][h] for n, h in sharp)]
        rows = [torch.stack([way[at].mean(0) for _, at in words]) if words else way[:0] for way in ways]
        maps.append(torch.stack(rows))
    tall, wide = max(x.shape[1] for x in maps), max(x.shape[2] for x in maps)
    even = [torch.nn.functional.pad(x, (0, wide - x.shape[2], 0, tall - x.shape[1]), value=torch.nan) for x in maps]
    known = all(sound.seconds for _, sound, *_ in heard)
    steps = [side * (sound.seconds / sound.places if known else 1.0) for _, sound, _, side, _ in heard]
    return SoundView(
        [name for name, *_ in heard],
        [[word for word, _ in words] for _, _, words, _, _ in heard],
        steps,
        "s" if known else "places",
        meant,
        sharp,
        kinds,
        numbers,
        torch.stack(even).half(),
        silence,
        entropy,
    )
