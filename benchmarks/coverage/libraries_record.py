"""benchmarks/records/libraries.json: names of other libraries' models, and the groups of those that are alike."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any, Self

from .rows import LIBRARIES

Group = dict[str, Any]
PACKAGES = {"timm": "timm", "diffusers": "diffusers", "open_clip": "open-clip-torch", "torch": "torch"}
TOLD = ("class", "kinds", "own", "softmax", "failed")  # what names of one group have in common


class Record:
    """Groups as they were met; of each name its group, layers and parameters; how many names a library has."""

    def __init__(self, groups: list[Group], names: dict[tuple[str, str], list[int]], known: dict[str, int]) -> None:
        self.groups, self.names, self.known = groups, names, known

    @classmethod
    def read(cls) -> Self:
        told = json.loads(LIBRARIES.read_text()) if LIBRARIES.exists() else {}
        names = {(source, name): x for source, found in told.get("names", {}).items() for name, x in found.items()}
        return cls(told.get("groups", []), names, told.get("known", {}))

    def keep(self, source: str, known: Collection[str]) -> None:
        """Names that the library has no more go, as do those that failed, which are looked at again."""
        self.known[source] = len(known)
        failed = {i for i, group in enumerate(self.groups) if "failed" in group}
        for key in [k for k, x in self.names.items() if k[0] == source and (k[1] not in known or x[0] in failed)]:
            del self.names[key]

    def sort_in(self, source: str, name: str, told: dict[str, Any]) -> None:
        kinds = told.get("kinds", {})
        common = {
            "library": source,
            "own": [],
            **{key: told[key] for key in TOLD if key in told},
            "kinds": sorted(kinds),
        }
        alike = (i for i, g in enumerate(self.groups) if all(g.get(k) == common.get(k) for k in ("library", *TOLD)))
        number = next(alike, len(self.groups))
        if number == len(self.groups):
            self.groups.append(common)
        self.names[source, name] = [number, sum(kinds.values()), told.get("parameters", 0)]

    def members(self, group: Group) -> list[str]:
        number = next(i for i, g in enumerate(self.groups) if g is group)
        return [name for (source, name), x in self.names.items() if source == group["library"] and x[0] == number]

    def smallest(self, group: Group) -> str:
        """The name of the group that has fewest parameters; the one that was measured, once there is one."""
        found = self.members(group)
        if group.get("by") in found:
            return str(group["by"])
        return min(found, key=lambda name: self.names[group["library"], name][2], default="")

    def write(self) -> None:
        def lines(rows: Iterable[str]) -> str:
            return ",\n".join(f"  {row}" for row in rows)

        names = {
            source: lines(
                f"{json.dumps(name)}: {json.dumps(x)}" for (of, name), x in sorted(self.names.items()) if of == source
            )
            for source in dict.fromkeys(source for source, _ in self.names)
        }
        head = {"date": time.strftime("%Y-%m-%d"), "versions": {n: version(p) for n, p in PACKAGES.items()}}
        head["known"] = self.known
        LIBRARIES.write_text(
            json.dumps(head)[:-1] + ',\n "groups": [\n' + lines(json.dumps(group) for group in self.groups)
            + '\n ],\n "names": {\n'
            + ",\n".join(f" {json.dumps(source)}: {{\n{found}\n }}" for source, found in names.items()) + "\n }}\n"
        )  # fmt: skip
