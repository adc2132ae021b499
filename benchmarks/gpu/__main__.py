"""python -m benchmarks.gpu [PART ...] [--budget SECONDS] [--again] [--rehearse]

Without a card it says so and exits with 3. What was measured of this card and these sources is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("parts", nargs="*", help="all where none are named")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds, divided among the parts")
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, recorded nowhere")
    given = parser.parse_args()
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # to be said before kernels are imported
    import torch

    if not (given.rehearse or torch.cuda.is_available()):
        print("make gpu: this machine has no card that torch can use, so nothing is measured", file=sys.stderr)
        return 3
    from benchmarks.gpu import keeping
    from benchmarks.gpu.parts import PARTS
    from benchmarks.speed import timing

    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    device, sizes = torch.device("cuda:0"), keeping.CARD
    if given.rehearse:
        timing.apart()
        device, sizes = torch.device("cpu"), keeping.REHEARSAL
    chosen = {name: PARTS[name] for name in (given.parts or PARTS)}
    began, spent, failed = time.monotonic(), 0.0, False
    for name, (share, measure) in chosen.items():
        spent += share
        until = began + given.budget * spent / sum(part for part, _ in chosen.values())
        kept = keeping.Kept(name, device, given.again)
        try:
            measure(kept, keeping.Room(device, sizes, until))
            kept.whole = time.monotonic() <= until
        except Exception as problem:  # the other parts are worth their time
            failed = True
            print(f"{name}: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
            if given.rehearse:
                raise
        kept.write()
        failed = failed or any(row.get("broken") or row.get("failed") for row in kept.rows)
        if name == "tune" and not given.rehearse:
            _write_table(kept, device)
    return int(failed)


def _write_table(kept: object, device: object) -> None:
    from heedful.gpu import blocks

    table = json.loads(blocks.TABLE.read_text(encoding="utf-8"))
    mine = table.setdefault(blocks.architecture(device), {})  # type: ignore[arg-type]
    for row in kept.rows:  # type: ignore[attr-defined]
        if row["best"] is not None:
            mine.setdefault(row["kind"], {})[str(row["width"])] = row["best"]
    blocks.TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    blocks.table.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
