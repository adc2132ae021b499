"""The law of what can be written into weights."""

from __future__ import annotations

import tempfile

import torch
from torch import nn

from heedful.conformance.model_laws import logits
from heedful.conformance.place import place
from heedful.conformance.subjects import text, tiny_model
from heedful.conformance.tolerances import close_model, error
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.errors import FoldError, ModelError
from heedful.core.method import Method, Part
from heedful.core.sites import HEADLESS_SITES
from heedful.folding import fold
from heedful.models.folders import quiet

KINDS = ("llama", "mha", "qwen3", "gpt2", "bert")


@law("where it goes into weights, that plain model answers as the attached one, before and after saving")
def folds_are_equal(method: Method) -> None:
    if type(method).folds is Method.folds:
        raise DoesNotApply("acts in a way that no weights can do")
    parts: list[Part] = [method, method.on(layers=1)]
    if not any(edit.site in HEADLESS_SITES for edit in method.edits):
        parts.append(method.on(layers=(0, 2), heads=(0, 1)))
    reasons = []
    for kind in KINDS:
        for part in parts:
            model = tiny_model(kind)
            try:
                plain = fold(model, part)
            except (FoldError, ModelError) as why:
                reasons.append(f"{kind}: {why}")
                continue
            requested = logits(model, part, input_ids=text())
            _require_equal(f"{kind}, {part!r}", plain, requested)
    if len(reasons) == len(KINDS) * len(parts):
        raise DoesNotApply(reasons[0].partition(": ")[2])


def _require_equal(case: str, plain: nn.Module, requested: torch.Tensor) -> None:
    found = logits(plain, input_ids=text())
    if not close_model(found, requested):
        raise Broken(f"{case}: in weights, logits differ by {error(found, requested):.2g}")
    for name, module in plain.named_modules():
        names = [type(module).__module__, *vars(module), *dict(module.named_parameters(recurse=False))]
        if any("heedful" in x for x in names):
            raise Broken(f"{case}: something of heedful stays in {name or 'the model'}")
    with quiet(local=True), tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)  # type: ignore[operator]
        again = type(plain).from_pretrained(folder, attn_implementation="eager").eval().to(place())  # type: ignore[attr-defined]
    if not torch.equal(logits(again, input_ids=text()), found):
        raise Broken(f"{case}: saved and loaded again, it answers differently")
