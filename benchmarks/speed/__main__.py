"""python -m benchmarks.speed KIND, one of those below or all.

OMP_PROC_BIND=true beside it.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    kinds = [
        "attention",
        "under",
        "step",
        "decoding",
        "cache",
        "sparse",
        "pattern",
        "model",
        "memory",
        "diagnose",
        "peers",
        "linear",
        "mechanisms",
        "training",
        "all",
    ]
    parser.add_argument("what", choices=kinds)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="*",
        default=[2048, 8192],
        help="lengths for the sparse methods; none: leave them out",
    )
    parser.add_argument("--kernel", type=int, nargs="*", default=[2048, 8192], help="the same for tables of blocks")
    parser.add_argument(
        "--patience", type=float, default=20.0, help="seconds a step that a mechanism may be foretold to take"
    )
    parser.add_argument("--again", nargs="*", default=[], help="mechanisms to be measured though they are recorded")
    parser.add_argument("--resume", action="store_true", help="take the losses of sparse methods that are recorded")
    parser.add_argument("--quick", action="store_true", help="short inputs and few rounds, as a try")
    given = parser.parse_args()
    if os.environ.get("OMP_PROC_BIND") != "true":
        print("OMP_PROC_BIND is not true: two threads may share a core, and ratios mean little", file=sys.stderr)
    from benchmarks.speed import (
        attention,
        cache,
        decoding,
        diagnose,
        linear,
        mechanisms,
        model,
        pattern,
        peers,
        sparse,
        timing,
        training,
    )

    if given.quick:
        timing.apart()
    if given.what in ("model", "all"):
        model.measure(given.quick)
    if given.what in ("memory", "all"):
        model.memory(given.quick)
    if given.what in ("diagnose", "all"):
        diagnose.measure(given.quick)
    if given.what in ("step", "all"):
        attention.step((8192,) if given.quick else (8192, 16384, 32768), 5 if given.quick else 15)
    if given.what in ("decoding", "all"):
        decoding.measure(256 if given.quick else 1024, 1 if given.quick else 5)
    if given.what in ("cache", "all"):
        cache.measure((8192,), 5 if given.quick else 25)
    if given.what in ("sparse", "all"):
        if given.quick:
            sparse.attempt()
        else:
            sparse.measure(tuple(given.tokens), tuple(given.kernel), given.resume)
    if given.what in ("pattern", "all"):
        pattern.measure(512 if given.quick else 2048, 1 if given.quick else 5)
    if given.what in ("attention", "all"):
        attention.prefill((1024, 2048) if given.quick else (1024, 2048, 4096, 8192, 16384), 3 if given.quick else 7)
    if given.what in ("under", "all"):
        attention.beside((256, 512) if given.quick else (1024, 2048), 3 if given.quick else 5)
    if given.what in ("linear", "all"):
        linear.measure((512, 1024) if given.quick else (256, 512, 1024, 2048, 4096, 8192), 3 if given.quick else 5)
    if given.what in ("mechanisms", "all"):
        mechanisms.measure((256, 1024) if given.quick else mechanisms.LENGTHS, 3, given.patience, given.again)
    if given.what in ("training", "all"):
        training.measure((512, 1024) if given.quick else (1024, 2048, 4096, 8192), 3 if given.quick else 5)
    if given.what in ("peers", "all"):
        peers.measure(given.quick)


main()
