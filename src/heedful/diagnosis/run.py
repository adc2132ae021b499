"""`heedful.diagnose`: one pass over the text for its measures and the token view, short ones for own prompts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heedful.adapters.wrapped import unwrapped
from heedful.api import attach, fit, still
from heedful.core.asked import asks, require_passed
from heedful.core.code import code_of
from heedful.core.errors import FieldError, ModelError, StatisticError
from heedful.core.files import PROFILE, UNFINISHED, folder_for, held
from heedful.core.fitted import Fitted
from heedful.core.kinds.conversion import Progress, Report
from heedful.core.kinds.loaded import Tokenizer, words_of
from heedful.core.kinds.weights import Measure, Weights
from heedful.core.method import Stack, method_of
from heedful.core.ranges import PositiveInt
from heedful.core.stats import Cat, Statistic
from heedful.diagnosis.apart import MOST, Found, dealt, joined, light
from heedful.diagnosis.corpus import Corpus, Shard
from heedful.diagnosis.measures import WEIGHTS, chosen, makes_trials, reads_text
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.shards import Reader, Sums, first_of
from heedful.diagnosis.store import ADDED, clean
from heedful.diagnosis.subject import Subject
from heedful.diagnosis.texts import Texts, Windows, ordinary, positions
from heedful.diagnosis.view import LooksByLayer, first_tokens
from heedful.diagnosis.workers import Workers, as_workers
from heedful.facts import facts_of, surroundings
from heedful.models import Loaded

LENGTH = 2048  # tokens of a window, where the model takes as many
SAVE_EVERY = 60.0  # seconds between two saves of what is there so far


@torch.no_grad()
@asks
def diagnose(  # noqa: PLR0913 - a verb's options, each by name
    model: nn.Module | Loaded,
    texts: Texts | Corpus,
    *,
    tokenizer: Tokenizer | None = None,
    measures: Iterable[Measure | str] | Measure | str | None = None,
    length: int | None = None,
    batch: PositiveInt = 1,
    out: str | Path | None = None,
    workers: int | Workers | None = None,
    progress: Report | None = None,
    **how: Any,
) -> Profile:
    """What the model's attention does on texts: a string, a Path to a file or folder, token ids, or a list of these.

    A `Corpus` is read shard by shard, by as many `workers` as are asked for, or by `Ray` or `Ranks` as these are set;
    its answer is the same whoever reads it.

    A model that reads images takes a Path to an image or a folder of them, which its own processor prepares, or their
    pixels, `[c rows cols]`, a batch, or a list of these; one that hears takes WAV files so, or features, and first
    writes down what is said. Measures that make prompts of their own are left out.

    `length` is the most tokens that one forward reads (2048, or as many as the model takes); what is longer is cut.
    With `batch` above 1 several windows are read at once, and no measure learns where delimiters stand. `out` is a
    folder for the profile: what is there so far is saved every minute, and the same call goes on where it stopped.
    `how` goes to `attach`: `only`, `backend`, `tile_rows`.
    """
    began = time.perf_counter()
    require_passed("diagnose()", how, diagnose, attach)
    given = model if isinstance(model, Loaded) else Loaded(unwrapped(model), None, "")
    folder = folder_for("diagnose()", out)
    subject = Subject(given.model, words_of(tokenizer or given.tokenizer), how, progress or (lambda _: None))
    parts = chosen(measures, subject.input.measures)
    length = _length(subject.model, length)
    corpus = _corpus(texts, workers)
    shards = corpus.shards() if corpus is not None else ()
    if subject.reads != "text":
        if corpus is not None:
            rule = f"holds texts, and {type(subject.model).__name__} reads {subject.reads}s: pass these, or their Path"
            raise FieldError("diagnose()", "texts", corpus, rule, Path(f"{subject.reads}s"))
        parts = tuple(part for part in parts if not makes_trials(part))
    if corpus is not None:
        windows = first_of(shards, subject, length)
    else:
        windows = subject.input.windows(subject, texts, tokenizer or given.tokenizer, length)  # type: ignore[arg-type]
    with still(subject.model):
        facts = _facts(subject, given.name, length)
        rows = (getattr(row, "features", row) for row in windows.tokens)
        named = Fitted({f"{i:09d}": row for i, row in enumerate(rows)}).digest[:16]
        facts["settings"] = _settings(
            facts, parts, corpus.digest() if corpus is not None else named, {"length": length, "batch": batch, **how}
        )
        readers = as_workers(workers, subject.model, "diagnose()")
        read = Reader(subject.model, subject.tokenizer, parts, length, batch, how)

        def whole() -> Profile:
            spent = time.perf_counter() - began
            with held(folder, "a diagnosis"):
                return _Job(subject, parts, windows, facts, batch, folder, shards, readers, read, spent).whole()

        return readers.together(whole, read)


def _corpus(texts: Texts | Corpus, workers: int | Workers | None) -> Corpus | None:
    """The texts as a corpus, where they are one or are to be read by several."""
    if isinstance(texts, Corpus):
        return texts
    if workers is None:
        return None
    if not isinstance(texts, Path):
        rule = "share the shards of a corpus: pass Corpus(...) or a Path as texts"
        raise FieldError("diagnose()", "workers", workers, rule, None)
    return Corpus(texts)


@dataclass(eq=False)
class _Job:
    """One diagnosis: text, trials, view."""

    subject: Subject
    parts: tuple[Measure, ...]
    windows: Windows
    facts: dict[str, Any]
    batch: int
    out: Path | None
    shards: tuple[Shard, ...]  # of a corpus; `windows` then are those of the first that can be read
    workers: Workers
    reader: Reader
    spent: float  # seconds, before it begins: sounds were written down, files read, weights told apart
    _looks: LooksByLayer = field(default_factory=dict)  # where the first window's first tokens look

    def whole(self) -> Profile:
        if (done := self._earlier("")) is not None:
            self.subject.report(Progress("text", 1, 1, f"finished before: read from {self.out}"))
            return done
        earlier = self._earlier(UNFINISHED)
        profile = self._corpus(earlier) if self.shards else self._text(earlier)
        profile += self._trials()
        profile += self._weights() + self._profile({}, "preparing", self.spent)
        profile = self._view(profile)
        if self.out is not None:
            profile.save(self.out)
            remove(self.out / UNFINISHED)
        return profile

    def _earlier(self, inside: str) -> Profile | None:
        """What an earlier call with the same settings left in the folder."""
        if self.out is None or not (self.out / inside / PROFILE).exists():
            return None
        found = Profile.load(self.out / inside)
        old, new = found.facts.get("settings", {}), self.facts["settings"]
        for key in {**new, **old}:
            if old.get(key) != new.get(key):
                raise StatisticError(
                    f"{self.out} holds a diagnosis with other settings: its {key} is {old.get(key)!r}, and this one's "
                    f"{new.get(key)!r}. Name another folder, or remove this one"
                )
        return found

    def _profile(self, statistics: dict[str, Statistic], stage: str, seconds: float, **facts: Any) -> Profile:
        counts = dict.fromkeys(ADDED, 0) | {"backends": [], "skipped": []} | facts
        return Profile({**self.facts, **counts, "seconds": {stage: seconds}}, self.parts, statistics)

    def _text(self, earlier: Profile | None) -> Profile:
        """All measures that take the user's text, in one pass."""
        mine = [(n, part) for n, part in enumerate(self.parts) if reads_text(part)]
        rows, total = self.windows.tokens, sum(map(self.subject.count, self.windows.tokens))
        start = earlier.facts["windows"] if earlier is not None else 0
        done = sum(map(self.subject.count, rows[:start]))
        note = f"goes on after {start} of {len(rows)} windows read before" if start else ""
        stage = self.subject.input.stage
        self.subject.report(Progress(stage, done, total, note))
        roles = self.subject.delimiters(self.batch)
        began = saved = time.perf_counter()
        read = start
        looking = (first_tokens(),) if read == 0 and self.subject.reads == "text" else ()
        whole: Found = {}
        apart: dict[int, Found] = dict(enumerate(earlier.in_parts if earlier is not None else ()))
        with self.subject.attach(Stack((*(part for _, part in mine), *looking))) as run:

            def so_far() -> Profile:
                facts: dict[str, Any] = {
                    "windows": read - start,
                    "tokens": sum(map(self.subject.count, rows[start:read])),
                }
                facts["backends"] = sorted(set(run.state.backends.values()))
                if earlier is None:
                    facts |= {name: getattr(self.windows, name) for name in ("texts", "left_out")}
                    facts["skipped"] = list(self.windows.skipped)
                new = self._profile(whole, stage, time.perf_counter() - began, **facts)
                return replace(new if earlier is None else earlier + new, apart=dealt(apart.values()))

            def take(unit: int) -> None:
                """Take what the run has read, for the whole and for one part of the texts."""
                nonlocal whole
                here = [key for key in run.state.statistics if key[0] < len(mine)]
                found = {f"{mine[n][0]}.{name}.{i}": run.state.statistics.pop((n, name, i)) for n, name, i in here}
                whole = joined(whole, found)
                apart[unit % MOST] = joined(apart.get(unit % MOST, {}), light(found))

            try:
                while read < len(rows) and mine:
                    taken = rows[read : read + self.batch]
                    if roles is not None:
                        run.roles = {"delimiters": roles.spans(taken[0])}
                    self.subject.read(run, taken)
                    take(self.windows.of[read] if self.windows.texts > 1 else read // self.batch)
                    read += len(taken)
                    done += sum(map(self.subject.count, taken))
                    self.subject.report(Progress(stage, done, total))
                    if self.out is not None and time.perf_counter() - saved > SAVE_EVERY:
                        so_far().save(self.out / UNFINISHED)
                        saved = time.perf_counter()
            except KeyboardInterrupt:
                if self.out is not None and read > start:
                    so_far().save(self.out / UNFINISHED)
                raise
            if looking and mine:
                self._looks = run[looking[0]]
            return so_far()

    def _corpus(self, earlier: Profile | None) -> Profile:
        """All measures that take text, shard by shard and added up in this order, so that nobody sees who read what."""
        sums = Sums() if earlier is None else Sums.of(earlier)
        start, total = sums.facts["shards"], len(self.shards)
        spent = earlier.facts["seconds"]["text"] if earlier is not None else 0.0
        note = f"goes on after {start} of {total} shards read before" if start else ""
        self.subject.report(Progress("corpus", start, total, note))
        began = saved = time.perf_counter()

        def so_far() -> Profile:
            facts = {**self.facts, **sums.facts, "seconds": {"text": spent + time.perf_counter() - began}}
            return Profile(facts, self.parts, sums.whole, None, sums.parts)

        def save() -> None:
            if self.out is not None and sums.facts["shards"] > start:
                so_far().save(self.out / UNFINISHED)

        try:
            with closing(self.workers.each(self.reader, self.shards[start:])) as pieces:
                for piece in pieces:
                    sums = sums.plus(piece)
                    self.subject.report(Progress("corpus", sums.facts["shards"], total))
                    if time.perf_counter() - saved > SAVE_EVERY:
                        save()
                        saved = time.perf_counter()
        except KeyboardInterrupt:
            save()
            raise
        return replace(so_far(), apart=dealt(sums.parts))

    def _trials(self) -> Profile:
        """The measures that make prompts of their own."""
        began = time.perf_counter()
        mine = [(n, part) for n, part in enumerate(self.parts) if makes_trials(part)]
        words = ordinary(self.subject.tokenizer, self.subject.model, self.subject.vocabulary)
        planned = [(n, part, list(method_of(part).probes(words, self.facts["length"]))) for n, part in mine]
        total = sum(probe.tokens.numel() for _, _, probes in planned for probe in probes)
        done = 0
        statistics: dict[str, Statistic] = {}
        for n, part, probes in planned:
            with self.subject.attach(part) as run:
                for probe in probes:
                    run.roles = probe.roles
                    self.subject.read(run, tuple(probe.tokens))
                    done += probe.tokens.numel()
                    self.subject.report(Progress("trials", done, total))
                statistics |= {f"{n}.{name}.{i}": s for (_, name, i), s in run.state.statistics.items()}
        return self._profile(statistics, "trials", time.perf_counter() - began)

    def _weights(self) -> Profile:
        """The measures that look at the weights alone; a model whose projections cannot be told apart goes without."""
        began = time.perf_counter()
        statistics: dict[str, Statistic] = {}
        for n, part in enumerate(self.parts):
            if isinstance(part, Weights):
                try:
                    found = fit(part, self.subject.model, (), only=self.subject.how.get("only"))
                except ModelError as reason:
                    self.subject.report(Progress("weights", 1, 1, f"without {type(part).__name__}: {reason}"))
                    continue
                statistics[f"{n}.{WEIGHTS}.0"] = Cat(dict(found.fitted))
        return self._profile(statistics, "weights", time.perf_counter() - began)

    def _view(self, profile: Profile) -> Profile:
        """Where the most notable heads look."""
        began = time.perf_counter()
        view = self.subject.input.view(self.subject, self.windows, profile, self._looks)
        return profile.viewed(view, time.perf_counter() - began)


def remove(folder: Path) -> None:
    """Take a profile's own files away, and the folder if nothing else is in it."""
    if folder.is_dir():
        (folder / PROFILE).unlink(missing_ok=True)
        clean(folder)
        if not any(folder.iterdir()):
            folder.rmdir()


def _length(model: Any, length: int | None) -> int:
    limit = positions(model)
    if length is None:
        return min(LENGTH, limit or LENGTH)
    if length < 2:
        raise FieldError("diagnose()", "length", length, "must be 2 tokens or more", LENGTH)
    if limit is not None and length > limit:
        raise FieldError("diagnose()", "length", length, f"{type(model).__name__} has {limit} positions", limit)
    return length


def _facts(subject: Subject, name: str, length: int) -> dict[str, Any]:
    """What is true of the model and the machine, and stays so during the run."""
    kind = {} if subject.reads == "text" else {"reads": subject.reads}
    return {**facts_of(subject.model, name, subject.layers), **kind, "length": length, **surroundings(subject.device)}


def _settings(
    facts: Mapping[str, Any], parts: tuple[Measure, ...], texts: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be equal for one call to go on where another stopped."""
    return {
        **{key: facts[key] for key in ("weights", "dtype")},
        "heedful": facts["versions"]["heedful"],
        "measures": [repr(part) for part in parts],
        "code": code_of(*parts),
        **{key: x if isinstance(x, int | str) else repr(x) for key, x in options.items() if x not in (None, "auto")},
        "texts": texts,
    }
