"""A profile's figures as tables."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from heedful.core.errors import HeedfulError
from heedful.core.figures import Curves, Figure, Grid, HeadMap, Listing

if TYPE_CHECKING:
    from heedful.diagnosis.profile import Profile


def _columns(figure: Figure) -> dict[str, list[Any]]:
    """One figure in long form: a column for each axis, and one for the value."""
    if isinstance(figure, Listing):
        return {name: [row[i] for row in figure.rows] for i, name in enumerate(figure.columns)}
    cells: list[tuple[Any, ...]]
    if isinstance(figure, HeadMap):
        maps = zip(figure.layers, figure.values.tolist(), strict=True)
        cells, names = [(n, h, x) for n, row in maps for h, x in enumerate(row)], ("layer", "head", "value")
    elif isinstance(figure, Grid):
        grid = zip(figure.rows, figure.values.tolist(), strict=True)
        cells = [(r, c, x) for r, row in grid for c, x in zip(figure.columns, row, strict=True)]
        names = (figure.row_label, figure.column_label, "value")
    elif isinstance(figure, Curves):
        lines = figure.lines.items()
        cells = [(line, x, y) for line, ys in lines for x, y in zip(figure.x, ys.tolist(), strict=True)]
        names = ("line", figure.x_label, figure.y_label)
    else:
        raise TypeError(f"no table for {type(figure).__name__}")
    return {name: [cell[i] for cell in cells] for i, name in enumerate(names)}


def tables(profile: Profile, arrow: bool) -> dict[str, Any]:
    """Every figure by its key, and the roles and findings."""
    columns = {key: _columns(figure) for key, figure in profile.figures().items()}
    rows = [(role.name, n, h, x) for role in profile.roles() for (n, h), x in role.heads.items()]
    columns["roles"] = {name: [row[i] for row in rows] for i, name in enumerate(("role", "layer", "head", "strength"))}
    found = profile.findings()
    columns["findings"] = {"finding": [f.text for f in found], "weight": [f.weight for f in found]}
    package = "pyarrow" if arrow else "pandas"
    try:
        library = import_module(package)
    except ModuleNotFoundError as missing:
        raise HeedfulError(f"tables need one more package: pip install {package}") from missing
    make = library.table if arrow else library.DataFrame
    return {key: make(table) for key, table in columns.items()}
