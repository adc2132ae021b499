"""A conversion that stops goes on where it stopped, bit for bit, and refuses what is not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import heedful
from heedful import converting, models
from heedful.core.errors import StatisticError
from heedful.core.files import TAUGHT
from heedful.core.kinds.conversion import Progress
from heedful.methods import AttentionEditing, GatedHeads, SinkWindow

from . import apart

HOW = AttentionEditing(SinkWindow(1, 4) | GatedHeads(fine_tune=True), layer_epochs=2, epochs=2)
KILLED = """
import os, sys, torch, heedful
from heedful import converting
from tests.test_converting import HOW, batches, model
converting.PAUSE = 0.0
def told(p):
    if (p.stage, p.done) == ("whole", 3):
        os._exit(9)
heedful.fit(HOW, model(), batches(), out=sys.argv[1], progress=told)
"""


def model() -> Any:
    torch.manual_seed(0)
    return models.tiny("llama")


def batches() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (2, 12), generator=draw)} for _ in range(2)]


def taught(out: Path | None = None, how: AttentionEditing = HOW, stop: tuple[str, int] | None = None) -> Any:
    told: list[Progress] = []

    def report(p: Progress) -> None:
        told.append(p)
        if (p.stage, p.done) == stop:
            raise KeyboardInterrupt

    with heedful.fit(how, model(), batches(), out=out, progress=report) as run:
        return {name: p.detach().clone() for name, p in run.model.named_parameters()}, told


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(x, two[name]) for name, x in one.items())


@pytest.mark.parametrize("stop", [("layers", 0), ("layers", 3), ("whole", 0), ("whole", 1), ("whole", 4)])
def test_it_goes_on_where_it_stopped(stop: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "PAUSE", 0.0)
    whole, _ = taught()
    with pytest.raises(KeyboardInterrupt):
        taught(tmp_path, stop=stop)
    found, told = taught(tmp_path)
    assert (told[0].stage, told[0].done) == stop
    assert told[0].note == (f"goes on after {stop[1]} steps" if stop[1] else "")
    assert same(found, whole)
    again, told = taught(tmp_path)
    assert [p.done for p in told] == [4], "nothing is done twice"
    assert same(again, whole)


def test_a_killed_one_goes_on_bit_by_bit(tmp_path: Path) -> None:
    ended = apart.script(KILLED, str(tmp_path))
    assert ended.returncode == 9, ended.stderr
    (tmp_path / f"{TAUGHT}.part").write_bytes(b"half")
    found, told = taught(tmp_path)
    assert (told[0].stage, told[0].done) == ("whole", 3)
    assert same(found, taught()[0])


def test_every_batch_has_its_turn_in_each_epoch() -> None:
    teacher, given, seen = model(), batches(), []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    heedful.fit(HOW, teacher, given).close()
    assert len(seen) == 16, "by the model and by its copy, which has the hook too"
    assert all(torch.equal(x, given[i // 2 % 2]["input_ids"]) for i, x in enumerate(seen))


def test_between_two_saves_some_time_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(converting, "save_file", lambda tensors, path, metadata: saved.append(metadata["done"]))
    taught(tmp_path)
    assert saved == ["0", "4", "0", "4"]


def test_a_folder_of_another_is_refused(tmp_path: Path) -> None:
    taught(tmp_path)
    other = AttentionEditing(HOW.target, layer_epochs=2, epochs=2, rate=1e-3)
    with pytest.raises(StatisticError, match="of another conversion"):
        taught(tmp_path, other)
    for fed in (batches()[:1], [{**batch, "return_dict": True} for batch in batches()]):
        with pytest.raises(StatisticError, match="of another conversion"):
            heedful.fit(HOW, model(), fed, out=tmp_path)
    with pytest.raises(StatisticError, match="of another conversion"):
        heedful.fit(HOW, model(), batches(), out=tmp_path, only="model")
    changed = model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    with pytest.raises(StatisticError, match="of another conversion"):
        heedful.fit(HOW, changed, batches(), out=tmp_path)
    with pytest.raises(StatisticError, match="holds a conversion"):
        heedful.diagnose(model(), torch.arange(20)[None], out=tmp_path)


def test_damage_is_told(tmp_path: Path) -> None:
    taught(tmp_path)
    file = tmp_path / TAUGHT
    whole = file.read_bytes()
    turned = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in (len(whole) - 9, len(whole) // 2)]
    for broken in (whole[:-7], *turned, whole.replace(b'"stage":"1"', b'"stage":"0"')):
        file.write_bytes(broken)
        with pytest.raises(StatisticError, match=r"was damaged .*; remove it to begin anew"):
            taught(tmp_path)
