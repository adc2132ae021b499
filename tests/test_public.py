"""The public face: names, lazy imports, the catalogue."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import heedful
from heedful import catalogue
from heedful.conformance.model_laws import composes
from heedful.core import fitted, kinds, packed, reweight, rules, sites, state, stats, summary
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import CatalogueError
from heedful.core.method import Method


def test_all_is_sorted_and_everything_in_it_is_there() -> None:
    assert heedful.__all__ == sorted(heedful.__all__)
    for name in heedful.__all__:
        assert getattr(heedful, name) is not None
    assert dir(heedful) == heedful.__all__
    assert len(heedful.__all__) <= 31, "a user should see at a glance what there is"
    from heedful import authoring, explaining

    for module in (authoring, explaining):
        assert module.__all__ == sorted(module.__all__)
        assert all(getattr(module, name) is not None for name in module.__all__)
    assert heedful.__version__.count(".") == 2
    with pytest.raises(AttributeError, match=r"heedful has no 'atach'. Did you mean attach"):
        heedful.atach  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(heedful, "nothing")
    assert not hasattr(explaining, "nothing")


@pytest.mark.parametrize(
    ("home", "name", "told"),
    [
        ("heedful", "Stak", r"heedful has no 'Stak'\. Did you mean Stack"),
        ("heedful", "SnapKV", r"There is heedful\.methods\.SnapKV\."),
        ("heedful", "logit_lens", r"There is heedful\.explaining\.logit_lens\."),
        ("heedful.explaining", "logit_lense", r"heedful\.explaining has no 'logit_lense'\. Did you mean logit_lens\?"),
        ("heedful.methods", "SnapKv", r"heedful\.methods has no 'SnapKv'\. Did you mean SnapKV\?"),
        ("heedful.methods", "Nowhere", r"heedful\.methods has no 'Nowhere'\. `heedful methods` lists them all"),
    ],
)
def test_a_name_that_is_not_there_is_told_with_those_near_it_by_import_too(home: str, name: str, told: str) -> None:
    with pytest.raises(ImportError, match=told):
        exec(f"from {home} import {name}")


def test_modules_within_are_imported_from_where_they_lie() -> None:
    exec("from heedful import core, rooms; from heedful.methods import observe; from heedful.explaining import aim")


def test_what_authors_are_told_of_they_can_import() -> None:
    """Names of core that CONTRIBUTING speaks of without saying where they lie."""
    from heedful import authoring

    said = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().split("Good to know")[1]
    told = set(re.findall(r"`@?([A-Za-z]\w+)(?:\([^`]*)?`", said))
    modules = (fitted, kinds, packed, reweight, rules, sites, state, stats, summary)
    core = {
        name
        for module in modules
        for name, x in vars(module).items()
        if getattr(x, "__module__", "") == module.__name__
    }
    assert {"ByIndex", "Reweight"} < told & core
    assert told & core <= set(authoring.__all__)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import heedful", ["torch", "transformers", "safetensors", "typer", "rich"]),
        ("import heedful; heedful.attach, heedful.Method, heedful.Run", ["transformers", "typer", "rich"]),
        ("import heedful.authoring", ["transformers", "typer", "rich"]),
        ("import heedful.catalogue as c; c.entries()", ["transformers", "typer", "rich"]),
    ],
)
def test_importing_brings_nothing_heavier_than_torch(code: str, absent: list[str]) -> None:
    script = f"{code}\nimport sys\nprint([m for m in {absent!r} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_the_catalogue_finds_and_searches() -> None:
    entries = catalogue.entries()
    assert list(entries) == sorted(entries)
    assert catalogue.find("sink_window") is catalogue.find("SinkWindow") is catalogue.find("2309.17453")
    assert catalogue.family(catalogue.find("SinkWindow")) == "sparse"
    assert catalogue.find("SinkWindow") in catalogue.search("streaming")
    assert catalogue.search("no such word") == []
    with pytest.raises(CatalogueError, match=r"no method named 'sinkwindo'. Did you mean SinkWindow\?"):
        catalogue.find("sinkwindo")


@pytest.mark.parametrize("name", sorted(catalogue.entries()))
def test_every_entry_keeps_every_law(name: str) -> None:
    report = heedful.check(catalogue.entries()[name])
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, kind in catalogue.entries().items() if issubclass(kind, Method)))
def test_every_method_composes_with_every_other(name: str) -> None:
    composes(catalogue.entries()[name].example(), every=True)


@pytest.mark.parametrize("name", sorted(catalogue.entries()))
def test_every_entry_is_a_value(name: str) -> None:
    kind: type[CatalogueEntry] = catalogue.entries()[name]
    one, two = kind.example(), kind.example()
    assert one == two
    assert hash(one) == hash(two)
    assert repr(one).startswith(name)


def test_methods_are_imported_by_name_and_one_at_a_time() -> None:
    from heedful import methods

    for name, kind in catalogue.entries().items():
        assert getattr(methods, name) is kind
    assert dir(methods) == methods.__all__ == sorted(catalogue.entries())
    with pytest.raises(AttributeError, match=r"heedful.methods has no 'SnapKv'. Did you mean SnapKV\?"):
        methods.SnapKv  # noqa: B018
    script = "from heedful.methods import SnapKV\nimport sys\nprint([m for m in sys.modules if 'heavy_hitter' in m])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]", "no other method's file was read"
