"""A small job over a corpus, as tests start it in processes of its own: corpus, folder, and who reads."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from heedful import models
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.kinds.conversion import Progress
from heedful.diagnosis import run as running
from heedful.diagnosis.corpus import Corpus
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.run import diagnose
from heedful.diagnosis.workers import Ranks, Workers
from tests.test_diagnose_texts import characters

MEASURES = ["SinkRate", "AttentionProfile", "MaxActivations"]


def written(folder: Path, count: int = 40) -> Path:
    """A corpus, with lines that are none among the others."""
    path = folder / "corpus.jsonl"
    rows = [json.dumps({"text": f"The keys, {i} to the cabinet; " * (1 + i % 5)}) for i in range(count)]
    rows[count // 3] = "{"
    path.write_text("\n".join(rows) + "\n")
    return path


def measured(corpus: Path, workers: int | Workers | None, out: Path | None = None, **how: Any) -> Profile:
    loaded = models.Loaded(models.tiny("llama"), characters(), "tiny")
    return diagnose(loaded, Corpus(corpus, shard=300), measures=MEASURES, workers=workers, out=out, **how)


def slowly(_: Progress) -> None:
    """Leaves time to be killed in."""
    time.sleep(0.05)


def stopped(now: Progress, error: BaseException) -> None:
    if now.done == 2:
        raise error


def main(corpus: Path, out: Path, who: str) -> None:
    torch.set_num_threads(1)
    running.SAVE_EVERY = 0.0
    if who != "ranks":
        measured(corpus, int(who) if who.isdigit() else None, out, progress=slowly)
        return
    torch.distributed.init_process_group("gloo")
    found = measured(corpus, Ranks(), out)
    rank = torch.distributed.get_rank()
    if rank:
        found.save(out.with_name(out.name + "-of-rank-1"))
    told = []
    for error in (FieldError("corpus_job", "done", 2, "is enough", 3), KeyboardInterrupt()):
        try:
            measured(corpus, Ranks(), progress=lambda now, error=error: stopped(now, error))
        except (HeedfulError, KeyboardInterrupt) as found_out:
            told.append(f"{type(found_out).__name__} {found_out}")
    out.with_name(f"{out.name}-stopped-{rank}").write_text("\n".join(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
