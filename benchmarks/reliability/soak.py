"""A model that is used over and over, by one reader or by everything: what is left in it, and in memory."""

from __future__ import annotations

import copy
import gc
import os
import random
import resource
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.interrupting import interrupted

SAMPLE = 30.0  # seconds between two looks at memory
WARM = 0.25  # of the time, after which memory should grow no more


def megabytes() -> float:
    """What this process holds of memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def soak(cycles: int) -> dict[str, Any]:
    """A reader put on a model and taken off, over and over: what is left of it."""
    from heedful import attach, models
    from heedful.conformance.model_laws import fingerprint
    from heedful.methods import AttentionProfile, SinkRate

    model, ids = models.tiny("llama").eval(), torch.arange(5, 37)[None]
    before, memory = (threading.active_count(), fingerprint(model)), []
    began = time.monotonic()
    for i in range(cycles):
        with attach(model, SinkRate() | AttentionProfile()) as run, torch.no_grad():
            run(input_ids=ids)
            run.answers()
        if i in (cycles // 4, cycles - 1):
            memory.append(megabytes())
    return {
        "cycles": cycles,
        "seconds": time.monotonic() - began,
        "growth in MB from a quarter on": memory[-1] - memory[0],
        "hooks, threads, config and weights as before": (threading.active_count(), fingerprint(model)) == before,
    }


@dataclass(eq=False)
class Job:
    """Tiny models and the default one, and what is done with them by chance."""

    draw: random.Random
    kinds: tuple[str, ...] = ("llama", "gemma2", "gpt2", "qwen3")
    models: dict[str, Any] = field(default_factory=dict)
    default: Any = None
    interrupts: int = 0  # that hit, before what they were meant for was over
    home: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="heedful-soak-")))

    def __post_init__(self) -> None:
        from heedful.catalogue import entries
        from heedful.core.kinds.weights import Surgery
        from heedful.core.method import Method
        from tests.test_diagnose_texts import characters

        self.words = characters()
        self.models |= {kind: self.made(kind) for kind in self.kinds}
        text = [k for k in entries().values() if issubclass(k, Method) and "text" in k.subjects]
        self.methods = [k.example() for k in text]
        self.readers = [m for m in self.methods if all(edit.reads for edit in m.edits)]
        self.surgeries = [k.example() for k in entries().values() if issubclass(k, Surgery)]

    def made(self, kind: str) -> Any:
        from heedful import models

        return models.Loaded(models.tiny(kind).eval(), self.words, kind)

    def model(self) -> Any:
        return self.models[self.draw.choice(self.kinds)]

    def text(self) -> str:
        return " ".join(self.draw.choice(("keys", "to the", "cabinet,", "are", "on", "tables.")) for _ in range(20))

    def ids(self, rows: int = 2) -> Any:
        return torch.tensor([[self.draw.randrange(3, 100) for _ in range(24)] for _ in range(rows)])

    def stack(self) -> Any:
        """One to three methods that can act together."""
        from heedful.core.errors import HeedfulError
        from heedful.core.method import Stack

        while True:
            try:
                return Stack(tuple(self.draw.sample(self.methods, self.draw.choice((1, 1, 2, 3)))))
            except HeedfulError:
                continue

    def folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.home))

    # what is done

    def observe(self) -> None:
        from heedful import attach
        from heedful.conformance.bare import ROLES

        with torch.no_grad(), attach(self.model().model, self.stack(), roles=ROLES) as run:
            for _ in range(self.draw.randint(1, 3)):
                run(input_ids=self.ids())
            run.answers()

    def learn(self) -> None:
        from heedful import attach
        from heedful.conformance.bare import ROLES

        model, ids = copy.deepcopy(self.model().model), self.ids()
        with attach(model, self.stack(), roles=ROLES) as run:
            run(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def generate(self) -> None:
        from heedful import attach
        from heedful.conformance.bare import ROLES

        how = self.draw.choice(({}, {"num_beams": 2}, {"do_sample": True}))
        with attach(self.model().model, self.stack(), roles=ROLES) as run, torch.no_grad():
            run.generate(input_ids=self.ids(), max_new_tokens=8, min_new_tokens=8, **how)

    def diagnose(self) -> None:
        from heedful import Profile, diagnose

        folder = self.folder()
        measures = self.draw.choice((None, self.draw.sample(self.readers, 3)))
        found = diagnose(self.model(), [self.text(), self.text()], measures=measures, out=folder)
        found += Profile.load(folder)
        str(found)
        found.page(folder / "page.html")

    def corpus(self) -> None:
        from heedful import diagnose
        from heedful.diagnosis.corpus import Corpus
        from tests import corpus_job

        corpus = Corpus(corpus_job.written(self.folder(), 12), shard=300)
        diagnose(self.model(), corpus, measures=corpus_job.MEASURES, out=self.folder())

    def compare(self) -> None:
        from heedful import Comparison, compare

        folder = self.folder()
        methods = self.draw.sample(self.methods, 2)
        compare(self.model(), methods, ["recall"], prompts=4, turns=1, out=folder)
        str(Comparison.load(folder))

    def save(self) -> None:
        from heedful import attach, load

        model, folder = copy.deepcopy(self.model().model), self.folder()
        with attach(model, self.stack()) as run, torch.no_grad():
            run(input_ids=self.ids())
            run.save(folder / "found.safetensors")
            run.merge(folder / "found.safetensors")
            model.save_pretrained(folder / "model")
        with load(folder / "model") as again, torch.no_grad():
            again(input_ids=self.ids())

    def look(self) -> None:
        from heedful import ablate, explaining, patterns

        loaded = self.model()
        patterns(loaded, self.text())
        with ablate(loaded, [(0, 1)]) as run, torch.no_grad():
            run(input_ids=self.ids())
        explaining.logit_lens(loaded.model, self.ids(1))

    def operate(self) -> None:
        from heedful import operate

        operate(self.model().model, self.draw.choice(self.surgeries))(input_ids=self.ids())

    def threads(self) -> None:
        """Two at a time, each with a model of its own."""
        from heedful import attach
        from heedful.methods import AttentionProfile, SinkRate

        def read(loaded: Any) -> None:
            with attach(loaded.model, SinkRate() | AttentionProfile()) as run, torch.no_grad():
                run(input_ids=ids)

        ids = self.ids()
        both = [threading.Thread(target=read, args=(self.models[kind],)) for kind in self.draw.sample(self.kinds, 2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()

    def real(self) -> None:
        """With a model that was trained, and its own tokenizer."""
        from heedful import attach, diagnose, models
        from heedful.methods import SnapKV, TempScale

        self.default = self.default or models.default()
        words = self.default.tokenizer(self.text(), return_tensors="pt")
        with attach(self.default.model, SnapKV(0.5) | TempScale(0.9)) as run, torch.no_grad():
            run.generate(**words, max_new_tokens=4)
        diagnose(self.default, self.text())

    def interrupt(self) -> None:
        """At any line of heedful's, in any of the other things."""
        act, lines = self.draw.choice(((self.observe, 5000), (self.generate, 18000), (self.diagnose, 80000)))
        self.interrupts += interrupted(self.draw.randrange(1, lines), act)


ACTS: dict[str, tuple[Callable[[Job], None], float]] = {
    "attach, read, answers, detach": (Job.observe, 12),
    "a step of training on a copy": (Job.learn, 4),
    "generate: greedy, beams, samples": (Job.generate, 6),
    "diagnose two texts, save, load, merge, page": (Job.diagnose, 2),
    "diagnose a corpus": (Job.corpus, 2),
    "compare two methods, save, load": (Job.compare, 2),
    "save a model with a stack, load both": (Job.save, 2),
    "patterns, ablation, logit lens": (Job.look, 2),
    "operate": (Job.operate, 2),
    "two threads, a model each": (Job.threads, 2),
    "the default model: generate with half of the cache, diagnose": (Job.real, 0.2),
    "one of these, interrupted at a random line": (Job.interrupt, 4),
}


@dataclass(eq=False)
class Watch:
    """What is seen of a process from time to time."""

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MB
    objects: list[int] = field(default_factory=list)  # that the collector knows
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)  # that are open
    load: list[float] = field(default_factory=list)

    def look(self, now: float) -> None:
        gc.collect()
        self.seconds.append(now)
        self.memory.append(megabytes())
        self.objects.append(len(gc.get_objects()))
        self.threads.append(threading.active_count())
        self.files.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        self.load.append(os.getloadavg()[0])

    def told(self, whole: float) -> dict[str, Any]:
        """Where it stood when it was warm and in the end, and its slope between."""
        first = next((i for i, x in enumerate(self.seconds) if x >= WARM * whole), 0)
        hours = [x / 3600 for x in self.seconds[first:]]

        def slope(values: Any) -> float:
            return statistics.linear_regression(hours, values[first:]).slope if len(hours) > 1 else 0.0

        return {
            "memory in MB, after a quarter of the time and in the end": [self.memory[first], self.memory[-1]],
            "memory in MB at each tenth of the time": [
                self.memory[min(i * len(self.memory) // 10, len(self.memory) - 1)] for i in range(1, 11)
            ],
            "highest memory in MB": max(self.memory),
            "growth in MB an hour from a quarter on": slope(self.memory),
            "objects in Python, after a quarter and in the end": [self.objects[first], self.objects[-1]],
            "growth in objects an hour": slope(self.objects),
            "threads, after a quarter and in the end": [self.threads[first], self.threads[-1]],
            "open files, after a quarter and in the end": [self.files[first], self.files[-1]],
            "load, lowest and highest": [min(self.load), max(self.load)],
        }


def mixed(seconds: int, seed: int = 0) -> dict[str, Any]:
    """Everything by chance, for so many seconds, on the same models."""
    from heedful.conformance.model_laws import fingerprint
    from heedful.core.errors import HeedfulError

    job, watch = Job(random.Random(seed)), Watch()
    names, weights = list(ACTS), [weight for _, weight in ACTS.values()]
    before = {kind: fingerprint(loaded.model) for kind, loaded in job.models.items()}
    done: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    changed, began, looked = 0, time.monotonic(), -SAMPLE
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    while (now := time.monotonic() - began) < seconds:
        (name,) = job.draw.choices(names, weights)
        try:
            ACTS[name][0](job)
        except HeedfulError:
            refused[name] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
            wrong[f"{name}: {error!r}"[:300]] += 1
            print(f"{name}: {error!r}", flush=True)
        done[name] += 1
        shutil.rmtree(job.home, ignore_errors=True)
        job.home.mkdir()
        for kind, loaded in job.models.items():
            if fingerprint(loaded.model) != before[kind]:
                changed += 1
                print(f"{kind} is another after: {name}", flush=True)
                job.models[kind] = job.made(kind)
        if now - looked > SAMPLE:
            watch.look(now)
            looked = now
            told = f"{sum(done.values())} acts, {watch.memory[-1]:.0f} MB, {watch.objects[-1]} objects"
            print(f"{now:.0f} s, {told}, {sum(refused.values())} refused", flush=True)
    shutil.rmtree(job.home)
    watch.look(time.monotonic() - began)
    return {
        "seconds": watch.seconds[-1],
        "done": dict(done),
        "interrupts that hit": job.interrupts,
        "refused": sum(refused.values()),
        "errors that are not heedful's own": dict(wrong),
        "models changed": changed,
        **watch.told(watch.seconds[-1]),
    }
