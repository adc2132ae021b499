"""Damaged and hostile files of a saved model: one plain error, and nothing of theirs is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heedful import load
from heedful.adapters.saving import TENSORS
from heedful.core.errors import HeedfulError, ModelError
from heedful.methods import GatedHeads

from .samples import Gate
from .test_saving import logits, saved, steering

SPELLING = {"method": "GatedHeads", "fields": {"start": 0.5}}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([], "was written by another release"),
        ({"format": 2, "parts": [SPELLING]}, "was written by another release"),
        ({"format": 1, "parts": []}, "its parts are"),
        ({"format": 1, "parts": ["os.system"]}, "its parts are"),
        ({"format": 1, "only": [3], "parts": [SPELLING]}, "was attached to"),
        ({"format": 1, "only": ["model.nowhere"], "parts": [SPELLING]}, "no served layer"),
        ({"format": 1, "parts": [{"method": "GatedHeads"}]}, "describes no method"),
        ({"format": 1, "parts": [{**SPELLING, "more": 1}]}, "'more' is nothing"),
        (
            {"format": 1, "parts": [{**SPELLING, "method": "this.Gate"}]},
            "this.Gate is defined outside.*import this first",
        ),
        ({"format": 1, "parts": [{**SPELLING, "method": "GatedHead"}]}, "Did you mean GatedHeads"),
        ({"format": 1, "parts": [{**SPELLING, "method": "PruneHeads", "fields": {}}]}, "holds methods, not Prune"),
        ({"format": 1, "parts": [{**SPELLING, "fields": {"stop": 1}}]}, "no such field"),
        ({"format": 1, "parts": [{**SPELLING, "fields": {"start": 2.0}}]}, "must lie between 0 and 1"),
        ({"format": 1, "parts": [{**SPELLING, "fields": {"start": "x"}}]}, "GatedHeads.start = 'x': must be a number"),
        ({"format": 1, "parts": [{**SPELLING, "layers": [7]}]}, "holds"),
        ({"format": 1, "parts": [{**SPELLING, "layers": "all"}]}, "one or more numbers from 0"),
        ({"format": 1, "parts": [{**SPELLING, "phase": {}}]}, "describes no"),
        ({"format": 1, "parts": [SPELLING, SPELLING]}, "lacks"),
        ({"format": 1, "parts": [{**SPELLING, "layers": [0]}]}, "holds"),
        ({"format": 1, "parts": [{"method": "TempScale", "fields": {}}]}, "holds"),
        ({"format": 1, "parts": [{"method": "SteeringVector", "fields": {"vectors": {"fitted": "0"}}}]}, "not there"),
    ],
)
def test_a_damaged_or_hostile_config_is_one_plain_error(told: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"heedful": told}))
    with pytest.raises(HeedfulError, match=message):
        load(tmp_path)
    assert "this" not in sys.modules  # nobody imports what a file names


def test_tensors_of_other_names_sizes_and_values_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, steering() | GatedHeads())
    weights, tensors = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / TENSORS)
    name = "model.layers.0.self_attn.heedful_GatedHeads_1_bias"

    def tried(message: str, **files: dict[str, Tensor]) -> None:
        save_file(files.get("weights", weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
        save_file(files.get("tensors", tensors), tmp_path / TENSORS)
        with pytest.raises(ModelError, match=message):
            load(tmp_path)

    tried(f"lacks {name}", weights={k: x for k, x in weights.items() if k != name})
    tried("lacks model.norm.weight", weights={k: x for k, x in weights.items() if k != "model.norm.weight"})
    tried("holds .*_2_bias", weights=weights | {name.replace("1_bias", "2_bias"): torch.zeros(4)})
    tried("cannot be loaded", weights=weights | {name: torch.zeros(3)})
    tried("its checksum is another", tensors={k: x + 1 for k, x in tensors.items()})
    tried("its checksum is another", tensors={k: x.double() for k, x in tensors.items()})
    tried("its checksum is another", tensors=tensors | {f"{min(tensors)}2": torch.zeros(2)})
    tried("are not there", tensors={})
    (tmp_path / TENSORS).unlink()
    with pytest.raises(ModelError, match="are not there"):
        load(tmp_path)


def test_flipped_and_missing_bytes_are_plain_errors(tmp_path: Path) -> None:
    wanted = saved(tmp_path, steering() | Gate())
    draw = torch.Generator().manual_seed(0)
    broken = 0
    for name in (TENSORS, "model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for i in range(40):
            at = (
                int(torch.randint(0, 9 * len(whole) // 10, (), generator=draw)) % 900
            )  # mostly in the header, where names and sizes stand
            cut = whole[:at] if i % 4 == 0 else whole[:at] + bytes([whole[at] ^ (1 << i % 8)]) + whole[at + 1 :]
            (tmp_path / name).write_bytes(cut)
            try:
                with load(tmp_path) as run:
                    assert logits(run).shape == wanted.shape
            except HeedfulError:
                broken += 1
        (tmp_path / name).write_bytes(whole)
    assert broken > 40
    with load(tmp_path) as run:
        assert torch.equal(logits(run), wanted)
