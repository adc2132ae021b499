"""A tiny random model, with inputs, of every class that transformers' auto mappings name.

`python -m benchmarks.coverage.tiny --out built.jsonl` builds them all and says which cannot be built.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .compose import candidates
from .names import class_names, model_class
from .rules import PLANS, Plan
from .shrink import shrunk
from .weights import condition, marked_empty

__all__ = ["CannotBuild", "Tiny", "build", "class_names", "output_tensors"]

MOST_PARAMETERS = 120_000_000
PATIENCE = 25
SEED = 0
_NOT_COMPARED = re.compile(
    r"(.*_)?(attentions|past_key_values|mems|cache|cache_params|hidden_states|loss|loss_dict|past_buckets_states)|state"
)


class CannotBuild(Exception):
    """No tiny model, or no inputs that it takes; the text says why."""


@dataclass(frozen=True)
class Tiny:
    """A model in eval mode and a forward's inputs."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    level: int = 0

    def forward(self) -> Any:
        """The output for copies of the inputs, under a fixed seed."""
        with torch.no_grad():
            torch.manual_seed(SEED)
            return self.model(**{name: tensor.clone() for name, tensor in self.inputs.items()})


def output_tensors(output: Any) -> list[Tensor]:
    """The float tensors of a forward's output that two runs can be compared by."""
    return list(_tensors(output)) or list(_tensors(output, everything=True))


def _tensors(value: Any, everything: bool = False) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value.detach()
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if everything or not _NOT_COMPARED.fullmatch(str(name)):
                yield from _tensors(part, everything)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part, everything)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, everything)


def build(class_name: str) -> Tiny:
    """A tiny model of that class and inputs for its forward, checked by one forward."""
    try:
        kind = model_class(class_name)
        default = kind.config_class()
    except Exception as error:
        raise CannotBuild(_say("default config", error)) from error
    reasons: list[str] = []
    start = time.process_time()
    for level, plan in enumerate(PLANS):
        try:
            model = _construct(kind, default, plan)
        except Exception as error:  # noqa: BLE001 - any failure is a reason
            reasons.append(_say(f"level {level} construction", error))
            if isinstance(error, ImportError):
                break
            continue
        for feed, failure in _trials(model):
            if failure is None:
                return Tiny(model, feed, level)
            reasons.append(f"level {level} forward: {failure}")
        del model
        gc.collect()
        if time.process_time() - start > PATIENCE:
            break
    raise CannotBuild(_most_telling(reasons))


def _construct(kind: type[PreTrainedModel], default: PreTrainedConfig, plan: Plan) -> PreTrainedModel:
    config = _config(kind, default, plan)
    if not plan.widths:
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size / 1e6:.0f} M parameters unshrunk")
        config = _config(kind, default, plan)
    with torch.random.fork_rng(devices=[]), marked_empty():
        torch.manual_seed(SEED)
        model = kind(config)
    model = model.float().eval()
    condition(model, SEED)
    return model


def _config(kind: type[PreTrainedModel], default: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The small configuration, in the role that the class's name claims."""
    config = kind.config_class(**shrunk(default, plan))
    if re.search(r"LMHead|ForCausalLM", kind.__name__) and "is_decoder" in vars(config):
        config.is_decoder = True
    if kind.__name__.endswith("EncoderModel") and config.is_encoder_decoder:
        config.is_encoder_decoder = False
    return config


def _trials(model: PreTrainedModel) -> Iterator[tuple[dict[str, Tensor], str | None]]:
    """Each feed with its failure; the first without one, None, is the last."""
    talk = candidates(model)
    try:
        feed = next(talk)
        while True:
            failure = _failure(Tiny(model, feed))
            yield feed, failure
            if failure is None:
                return
            feed = talk.send(failure)
    except StopIteration:
        return


def _failure(tiny: Tiny) -> str | None:
    try:
        tensors = output_tensors(tiny.forward())
        eager = copy.deepcopy(tiny.model)
        eager.set_attn_implementation("eager")
        output_tensors(Tiny(eager, tiny.inputs).forward())
    except Exception as error:  # noqa: BLE001 - any failure is a reason
        return _say(f"({', '.join(tiny.inputs)})", error)
    if not tensors:
        return f"({', '.join(tiny.inputs)}): no float output"
    if not all(bool(torch.isfinite(t).any()) for t in tensors):
        return f"({', '.join(tiny.inputs)}): output all NaN or infinite"
    return None


def _say(what: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{what}: {type(error).__name__}: {text[:300]}"


def _most_telling(reasons: list[str]) -> str:
    """The missing library if there is one, else the last failure at the first level."""
    for reason in reasons:
        if "requires the" in reason:
            return re.sub(r".*?(\w+ requires the \w+ library).*", r"\1", reason)
    first = [r for r in reasons if r.startswith(reasons[0][:7])]
    return first[-1] if first else "nothing tried"


if __name__ == "__main__":
    from .sweep import main

    logging.set_verbosity_error()
    main()
