"""The law of what is saved."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch

from heedful.conformance.model_laws import tried_on
from heedful.conformance.place import place
from heedful.conformance.subjects import Subject
from heedful.conformance.tolerances import error
from heedful.conformance.verdict import Broken, law
from heedful.core.method import Method
from heedful.models.folders import quiet
from heedful.saving import load


@law("a model that is saved with it attached, and loaded again, has the same stack and answers the same, bit for bit")
def survives_saving(method: Method) -> None:
    for subject, kind, model in tried_on(method, first=True):
        with torch.no_grad():
            try:
                _survives(method, subject, copy.deepcopy(model))  # saving writes into the config of what is saved
            except Broken as how:
                raise Broken(f"{kind}: {how}") from how


def _survives(method: Method, subject: Subject, model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    with quiet(local=True), tempfile.TemporaryDirectory() as folder:
        with subject.attach(model, method) as run:
            for parameter in run.parameters():  # away from where it starts, as training would
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter)
            wanted = run(**subject.inputs()).logits
            model.save_pretrained(folder)
        with load(folder, roles=subject.roles, attn_implementation="eager") as again:
            again.model.to(place())
            again.model.train(model.training)
            if again.stack != run.stack:
                raise Broken(f"what was saved as {run.stack!r} is loaded as {again.stack!r}")
            found = again(**subject.inputs()).logits
    if not torch.equal(found, wanted):
        raise Broken(f"saved and loaded again, logits differ by {error(found, wanted):.2g}")
