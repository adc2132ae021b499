"""Damaged files of every verb: whatever a disk or an editor did to them, the outcome is an answer or a plain error."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from heedful import models
from heedful.bench.compare import compare
from heedful.bench.comparison import Comparison
from heedful.bench.records import Log, read
from heedful.core import fitted
from heedful.core.errors import HeedfulError
from heedful.core.files import PROFILE, RECORDS, digest_of
from heedful.core.stats import (
    DIGEST,
    HEADER,
    OF,
    Histogram,
    Max,
    Mean,
    Moments,
    Statistic,
    Sum,
    TopK,
    _digest,
    load,
    save,
)
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.run import diagnose
from heedful.laboratory.outcome import Lab
from heedful.laboratory.records import Trainings
from heedful.methods.observe.max_activations import Peaks
from heedful.methods.observe.sink_rate import Columns
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from tests.lab.small import Halved, Little
from tests.test_compare import Echo, Loss

Swap = Callable[[random.Random, bytes], bytes]
OTHER = (None, True, False, -1, 0, 3, 1e308, 1e-308, "3", "", "\0", "../x", [], {}, [[]], {"a": None}, [1, "b"])
SHAPES = ([2**40], [2, 2**33], [2**70], [-1], [0], [], [1] * 99, [1e3], ["4"], [None], [[1]])
KINDS = (torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool)


def flipped(draw: random.Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 4))):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def cut_short(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def torn(draw: random.Random, content: bytes) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.randint(1, 64) :]


def grown(draw: random.Random, content: bytes) -> bytes:
    start = draw.randrange(len(content))
    more = draw.choice((b"\0" * 64, b"[" * 100_000, b"NaN", b'"', b"\n", draw.randbytes(32)))
    return content[:start] + more + content[start:]


def _replaced(draw: random.Random, value: Any) -> Any:
    """The value with one thing somewhere inside exchanged, taken out or put in."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if value else []
    if not inside or draw.random() < 0.2:
        return draw.choice(OTHER)
    key, old = draw.choice(inside)
    if draw.random() < 0.1:
        return {k: v for k, v in inside if k != key} if isinstance(value, dict) else value[:key] + value[key + 1 :]
    new = _replaced(draw, old) if isinstance(old, dict | list) else draw.choice(OTHER)
    return {**value, key: new} if isinstance(value, dict) else [*value[:key], new, *value[key + 1 :]]


def swapped(draw: random.Random, content: bytes) -> bytes:
    """A line of JSON, or all of it, with a value of another kind."""
    text = content.decode()
    lines = text.splitlines() if text.startswith('{"record') else [text]
    i = draw.randrange(len(lines))
    lines[i] = json.dumps(_replaced(draw, json.loads(lines[i])))
    return "\n".join([*lines, ""]).encode()


def forged(draw: random.Random, content: bytes) -> bytes:
    """A profile with a value of another kind, and the digest that goes with it."""
    found = json.loads(swapped(draw, content))
    return json.dumps({**found, "digest": digest_of(found)} if isinstance(found, dict) else found).encode()


def restated(draw: random.Random, content: bytes) -> bytes:
    """Statistics whose file says something else of its tensors, or holds others, and the digest that goes with it."""
    tensors = safetensors.torch.load(content)
    size = int.from_bytes(content[:8], "little")
    told = json.loads(content[8 : 8 + size])["__metadata__"]
    header = json.loads(told[HEADER])
    if draw.random() < 0.3:
        name = draw.choice(sorted(tensors))
        x = tensors[name]
        tensors[name] = draw.choice((x[:0], x[None], x.flatten(), x.to(draw.choice(KINDS)), torch.full_like(x, 77)))
    elif draw.random() < 0.4:
        shapes = draw.choice(list(header.values()))["shapes"]
        draw.choice(shapes)[draw.randrange(2)] = draw.choice((*SHAPES, *map(str, KINDS), "Tensor", "save"))
    else:
        header = _replaced(draw, header)
    text = json.dumps(header)
    told |= {HEADER: text, DIGEST: _digest(told[OF] + text, tensors)}
    return safetensors.torch.save({name: x.clone() for name, x in tensors.items()}, told)


@contextmanager
def seconds(most: int) -> Iterator[None]:
    """A hang is an error."""

    def late(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile and one with a comparison."""
    home = tmp_path_factory.mktemp("whole")
    model = models.tiny("llama")
    diagnose(model, torch.arange(5, 25), measures=["SinkRate", "AttentionProfile", "WeibullWeights"], out=home / "p")
    loaded = models.Loaded(model, object(), "tiny")
    compare(loaded, [SinkWindow(1, 4)], [Echo(), Loss()], prompts=3, turns=1, out=home / "c")
    Trainings(home / "l").record(Little(), Halved(), 0)
    return home


def read_profile(folder: Path) -> None:
    found = Profile.load(folder)
    str(found)
    found.figures()


def read_comparison(folder: Path) -> None:
    found = Comparison.load(folder)
    str(found)
    found.to_pandas()


def gone_on_with(folder: Path) -> None:
    Log(folder / RECORDS, read(folder / RECORDS)[0], 0)


def read_lab(folder: Path) -> None:
    found = Lab.load(folder)
    str(found)
    found.to_pandas()


def read_weights(folder: Path) -> None:
    with Trainings(folder).opened(Little(), Halved(), 0):
        pass


PLANS: dict[str, tuple[str, str, Callable[[Path], None], tuple[Swap, ...]]] = {
    "profile": ("p", PROFILE, read_profile, (flipped, cut_short, torn, grown, swapped, forged)),
    "statistics": ("p", "statistics-*", read_profile, (flipped, cut_short, torn, grown, restated)),
    "records": ("c", RECORDS, read_comparison, (flipped, cut_short, torn, grown, swapped)),
    "lab": ("l", "*.json", read_lab, (flipped, cut_short, torn, grown, swapped)),
    "weights": ("l", "*.safetensors", read_weights, (flipped, cut_short, torn, grown)),
    "log": ("c", RECORDS, gone_on_with, (flipped, cut_short, torn, grown, swapped)),
}


def outcomes(name: str, home: Path, tmp_path: Path, count: int, first: int = 0) -> Counter[str]:
    """How many damaged files were read, refused, or did something else; each number is a damage of its own."""
    folder, pattern, use, ways = PLANS[name]
    shutil.copytree(home / folder, tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob(pattern)
    whole = file.read_bytes()
    use(file.parent)
    found: Counter[str] = Counter()
    for number in range(first, first + count):
        draw = random.Random(f"{name} {number}")
        file.write_bytes(draw.choice(ways)(draw, whole))
        try:
            with seconds(20):
                use(file.parent)
            found["read"] += 1
        except HeedfulError:
            found["refused"] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
            found[f"{number}: {error!r}"[:300]] += 1
    return found


@pytest.mark.parametrize("name", PLANS)
def test_damaged_files_are_read_or_refused(name: str, files: Path, tmp_path: Path) -> None:
    found = outcomes(name, files, tmp_path, 334)
    assert set(found) <= {"read", "refused"}, found
    assert found["refused"] > 66


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_many_damaged_files_are_read_or_refused(name: str, files: Path, tmp_path: Path) -> None:
    found = outcomes(name, files, tmp_path, 16_667)
    assert set(found) <= {"read", "refused"}, found


def test_one_flipped_bit_of_a_tensor_is_seen(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "p", tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("statistics-*")
    whole = file.read_bytes()
    for place in range(len(whole) - 2000, len(whole), 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(HeedfulError, match="its checksum is another"):
            Profile.load(file.parent)


def test_statistics_outside_of_the_folder_are_not_opened(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "p", tmp_path / "copy")
    found = json.loads((tmp_path / "copy" / PROFILE).read_text())
    for name in ("../../x.safetensors", "statistics-0/../x.safetensors", 3):
        forged = {**found, "statistics": name}
        (tmp_path / "copy" / PROFILE).write_text(json.dumps({**forged, "digest": digest_of(forged)}))
        with pytest.raises(HeedfulError, match="they lie beside it"):
            Profile.load(tmp_path / "copy")


@pytest.mark.parametrize("shape", [[2**26 + 65], [2**40], [2**70], [-1], [0], [2, 1], "a"])
def test_a_small_file_speaks_of_no_more_numbers_than_fit(shape: Any, tmp_path: Path) -> None:
    """One number of a few bytes was laid out as often as the file said, until memory was full."""
    tensors = {"x/total": torch.ones(1, dtype=torch.uint8)}
    told = {"x": {"kind": "Sum", "settings": {}, "tensors": ["total"], "shapes": [[shape, "float64"]]}}
    text = json.dumps(told)
    metadata = {HEADER: text, OF: "", DIGEST: _digest(text, tensors)}
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(HeedfulError, match="holds no heedful statistics that fit together"):
        load(tmp_path / "x.safetensors")


def test_parts_of_other_shapes_are_not_read(tmp_path: Path) -> None:
    """A count that is one number along an axis, and so may be laid out as often as the file says."""
    file = save(tmp_path / "x.safetensors", {"x": Mean.of(torch.rand(2, 5), 3.0)})
    tensors = safetensors.torch.load_file(file)
    told = {"kind": "Mean", "settings": {}, "tensors": ["total", "count"]}
    for rows, fits in ((2, True), (3, False)):
        shapes = [[[2, 5], "float64"], [[rows, 5], "float64"]]
        text = json.dumps({"x": told | {"shapes": shapes}})
        file.write_bytes(safetensors.torch.save(tensors, {HEADER: text, OF: "", DIGEST: _digest(text, tensors)}))
        with (
            nullcontext()
            if fits
            else pytest.raises(HeedfulError, match=r"fit together.*x is a Mean whose parts have the shapes")
        ):
            assert torch.equal(load(file)["x"].tensors()["count"], torch.full((2, 5), 3.0, dtype=torch.float64))


NUMBERS = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0))
WHOLE = {
    "mean": Mean.of(NUMBERS, 3.0),
    "moments": Moments.of(NUMBERS),
    "max": Max.of(NUMBERS),
    "top": TopK.of(NUMBERS, 2),
    "columns": Columns.of(NUMBERS.expand(2, 3, 2, 5)[:, :, 0], NUMBERS[:, 0], 2),
    "peaks": Peaks(*Max.of(NUMBERS).tensors().values(), NUMBERS.sum((1, 2)), torch.ones(3)),
}


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, stat in WHOLE.items() for part in stat.tensors()])
def test_a_part_of_another_shape_is_refused_even_where_it_could_be_spread(kind: str, part: str, tmp_path: Path) -> None:
    whole = WHOLE[kind]
    old = whole.tensors()[part]
    assert torch.equal(load(save(tmp_path / "whole", {"x": whole}))["x"].tensors()[part], old)
    others = [old.narrow(axis, 0, 1) for axis in range(old.ndim) if old.shape[axis] > 1]
    for other in (*others, old[None]):
        with pytest.raises(HeedfulError, match=f"x is a {type(whole).__name__} whose parts have the shapes"):
            load(save(tmp_path / "other", {"x": whole.having({part: other})}))


@pytest.mark.parametrize(("kind", "parts"), [("columns", ("early", "early_count")), ("peaks", ("total", "count"))])
def test_parts_that_fit_each_other_and_not_the_rest_are_refused(
    kind: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    whole = WHOLE[kind]
    other = whole.having({part: whole.tensors()[part].narrow(0, 0, 1) for part in parts})
    with pytest.raises(HeedfulError, match="whose parts have the shapes"):
        load(save(tmp_path / "other", {"x": other}))


@pytest.mark.parametrize(
    "stat", [Histogram((0.0, 0.5, 1.0), NUMBERS), TopK(4, NUMBERS, NUMBERS.long())], ids=["5 of 2", "5 of 4"]
)
def test_parts_that_do_not_fit_a_setting_are_refused(stat: Statistic, tmp_path: Path) -> None:
    with pytest.raises(HeedfulError, match="whose parts have the shapes"):
        load(save(tmp_path / "x", {"x": stat}))


def test_what_is_saved_can_be_loaded_however_alike_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "MOST", 100)
    for n in (10, 1000):
        file = save(tmp_path / "x.safetensors", {"x": Sum(torch.ones(3, n, dtype=torch.float64))})
        assert torch.equal(load(file)["x"].value, torch.ones(3, n))
    assert file.stat().st_size > 3 * 1000 * 8
