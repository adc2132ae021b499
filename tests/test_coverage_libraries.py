"""The record of other libraries' names: alike names are one group, the smallest is measured, the page tells of all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.coverage import libraries, libraries_models, libraries_page, libraries_record, page
from benchmarks.coverage.libraries_look import look, switches, unset
from benchmarks.coverage.libraries_models import smaller
from benchmarks.coverage.libraries_record import Record
from benchmarks.coverage.library_cases import Case, draw
from tests.torch_models import Attention

PLAIN: dict[str, Any] = {"class": "A", "own": [], "kinds": {"m.Attention (fused_attn)": 2}}
REFUSED: dict[str, Any] = {"class": "A", "own": ["XCA: over channels, not over tokens"], "kinds": {}}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    for place in (libraries_record, libraries_page):
        monkeypatch.setattr(place, "LIBRARIES", tmp_path / "libraries.json")
    found = Record.read()
    found.known = {"timm": 6, "open_clip": 1}
    found.sort_in("timm", "large", PLAIN | {"parameters": 9})
    found.sort_in("timm", "small", PLAIN | {"parameters": 4})
    found.sort_in("timm", "other", PLAIN | {"parameters": 1, "class": "B"})
    found.sort_in("timm", "channels", REFUSED | {"parameters": 2})
    found.sort_in("timm", "conv", {"class": "C", "own": [], "kinds": {}, "parameters": 5})
    found.sort_in("timm", "gate", {"class": "C", "own": [], "kinds": {}, "parameters": 6, "softmax": ["c.py:f"]})
    found.sort_in("open_clip", "broken", {"failed": "ValueError: no"})
    return found


def test_names_alike_are_a_group_whose_smallest_is_measured(record: Record, tmp_path: Path) -> None:
    record.write()
    again = Record.read()
    assert again.groups == record.groups
    assert again.names == {key: list(x) for key, x in record.names.items()}
    assert [again.members(group) for group in again.groups] == [
        ["large", "small"], ["other"], ["channels"], ["conv"], ["gate"], ["broken"],
    ]  # fmt: skip
    assert again.smallest(again.groups[0]) == "small"
    again.groups[0]["by"] = "large"  # it was measured, and stays so
    assert again.smallest(again.groups[0]) == "large"
    assert again.names["timm", "small"] == [0, 2, 4]
    assert len(json.loads((tmp_path / "libraries.json").read_text())["names"]["timm"]) == 6


def test_names_that_are_gone_or_failed_are_looked_at_anew(record: Record) -> None:
    record.keep("timm", {"small", "conv"})
    record.keep("open_clip", {"broken"})
    assert [key[1] for key in record.names] == ["small", "conv"]
    assert record.smallest(record.groups[1]) == ""
    record.keep("timm", {"small", "conv", "new"})
    timm, _, both = libraries_page._totals(record, {"timm": "1.0", "open_clip": "3.0"})
    assert timm == ["timm 1.0", "3", "1", "0", "0", "0", "0", "1", "1", "0", "1"]
    assert both == ["all", "4", "1", "0", "0", "0", "0", "1", "1", "0", "2"]


def test_the_page_counts_every_name_by_library_and_reason(record: Record) -> None:
    record.groups[0] |= {"status": "served", "by": "small", "layers": 3, "entered": 3}
    record.groups[2] |= {"status": "refused", "reason": "what a message has room for", "by": "channels"}
    record.groups[2]["own"] = [*REFUSED["own"], *(f"Cascade: {n} calls in one forward" for n in (2, 3))]
    record.write()
    told = libraries_page.section(page.table)
    assert "| library | names | with attention | served whole | in part | refused by name, with the reason |" in told
    assert re.search(r"^\| timm \S+ \| 6 \| 4 \| 2 \| 0 \| 1 \| 0 \| 1 \| 2 \| 0 \| 0 \|$", told, re.MULTILINE)
    assert "\n| all | 7 | 4 | 2 | 0 | 1 | 0 | 1 | 2 | 1 | 0 |\n" in told
    assert libraries_page.sentence() == (
        "Of 4 names of timm, diffusers and open_clip whose models have attention, 2 are served whole and 0 in part, "
        "1 are refused with the reason and 0 are wrong; 1 were only looked at, without weights. "
        "1 more could not be built."
    )
    assert "| timm | A | m.Attention (fused_attn) | served | small | 3/3 | 2 |" in told
    several = "XCA: over channels, not over tokens; Cascade: several calls in one forward"
    assert f"| timm | refused | {several} | 1 |" in told
    assert "| timm | A | XCA, Cascade | refused | channels |  | 1 |" in told
    assert "| open_clip | cannot build | ValueError: no | 1 |" in told
    assert "- timm, A, as small (served): large, small" in told
    assert "- timm: C (2); softmaxes that make no map, in c.py:f" in told


@pytest.mark.parametrize(
    ("status", "why"),
    [("looked at", "9 parameters"), ("wrong", "9 parameters"), ("refused", "A: b"), ("served in part", "A: b")],
)
def test_a_reason_is_that_of_what_became_of_a_group(status: str, why: str) -> None:
    assert libraries_page._why({"own": ["A: b"], "status": status, "reason": "9 parameters"}) == why


def test_what_was_only_looked_at_is_measured_where_it_can_be_made_small(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.groups[0] |= {"status": "served", "by": "small"}
    record.groups[1] |= {"status": "looked at", "reason": "9 parameters"}
    asked: list[str] = []
    monkeypatch.setattr(libraries, "_measured", lambda group, name: asked.append(name) or {"status": "served"})
    libraries.measure_all(record, "small|other")
    assert asked == ["other"]
    assert record.groups[1]["status"] == "served"
    assert "reason" not in record.groups[1]
    monkeypatch.setattr(libraries_models, "NARROW", {"DiTTransformer2DModel": {"num_layers": 1}})
    assert [*smaller("diffusers", "DiTTransformer2DModel")] == [{"num_layers": 1}, {"num_attention_heads": 4}, {}]
    assert [*smaller("diffusers", "other")] == [{"num_attention_heads": 4}, {}]


class Net(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(layers))
        self.blocks[0].fused_attn = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_look_needs_no_weights_and_tells_kinds_apart() -> None:
    with torch.device("meta"), unset():
        model = Net(3)
        told = look(model, lambda: model(torch.empty(2, 10, 32)))
    assert {**told["kinds"]} == {"torch_models.Attention": 2, "torch_models.Attention (fused_attn)": 1}
    assert (told["class"], told["own"], told["parameters"]) == ("Net", [], sum(p.numel() for p in model.parameters()))
    assert switches(model.blocks[0]) == ("fused_attn",)
    assert not nn.init.zeros_(torch.ones(3)).any(), "weights are drawn again outside"


class Branches(nn.Module):
    """Weighs two branches, as selective kernels do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([x, x.flip(1)], 1)
        return (both * both.mean((2, 3), keepdim=True).softmax(1)).sum(1)


def test_a_softmax_of_no_product_is_told_by_where_it_stands() -> None:
    model = nn.Sequential(Branches())
    told = look(model, lambda: model(torch.empty(2, 10, 32)))
    assert (told["kinds"], told["own"]) == ({}, [])
    assert told["softmax"] == ["test_coverage_libraries.py:Branches.forward"]


def test_no_further_than_torchs_formula_is_from_its_kernel_is_near() -> None:
    def near(found: list[torch.Tensor], apart: float) -> bool:
        """`apart` is what torch's formula is from its kernel."""
        case = Case(nn.Identity(), lambda: one + apart * (not torch.backends.cuda.flash_sdp_enabled()), 2)
        return libraries._near(case, found, [one])

    one = torch.ones(3)
    assert near([one], 0.5)
    assert near([one + torch.finfo(one.dtype).eps], 0.0), "within the budget"
    assert near([one + 0.4], 0.5)
    assert not near([one + 0.6], 0.5)
    assert not near([torch.full((3,), torch.nan)], 0.5)
    assert not near([torch.full((3,), torch.inf)], torch.nan)
    assert not near([one, one], 0.5)


@pytest.mark.filterwarnings("ignore:this run changed nothing")
@torch.no_grad()
def test_what_does_not_pass_through_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "Look", libraries.DropHeads)
    model, x = Net(2).eval(), draw(2, 10, 32)
    found = libraries.examine(Case(model, lambda: model(x), 2))
    assert (found["status"], found["reason"]) == ("wrong", "passed through; read in tiles")


@torch.no_grad()
def test_what_is_examined_is_entered_and_moved() -> None:
    model, x = Net(2).eval(), draw(2, 10, 32)
    found = libraries.examine(Case(model, lambda: model(x), 2))
    assert found == {"status": "served", "layers": 2, "entered": 2}
    model.blocks[1].register_forward_hook(lambda module, *_: setattr(module, "kept", 1))
    assert libraries.examine(Case(model, lambda: model(x), 2))["status"] == "served", "the model's own doing"
    model.blocks[1].forward = lambda x: x
    assert libraries.examine(Case(model, lambda: model(x), 2))["layers"] == 1
    model.blocks[0].forward = lambda x: x
    assert libraries.examine(Case(model, lambda: model(x), 2))["status"] == "no attention"


@torch.no_grad()
def test_a_model_that_draws_noise_draws_the_same_each_time() -> None:
    model, x = Net(2).eval(), draw(2, 10, 32)
    assert libraries.examine(Case(model, lambda: model(x + torch.randn(2, 10, 32)), 2))["status"] == "served"
