"""Statistics of many layers as one, which merge in one step: where merging goes by element, layers are an axis more."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from heedful.core.stats import Statistic
from heedful.diagnosis.apart import Found, joined

BETWEEN = ","  # stands between the numbers of layers that a key names


def stacked(found: Mapping[str, Statistic]) -> Found:
    """The same, with one statistic for all layers in which one reader's are alike: "0.look.0,1,2"."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for key, stat in found.items():
        sizes = tuple((name, x.shape, x.dtype) for name, x in stat.tensors().items())
        own = () if stat.by_element and BETWEEN not in key else (key,)
        alike.setdefault((key.rpartition(".")[0], type(stat), repr(stat.settings()), sizes, *own), []).append(key)
    out: Found = {}
    for keys in alike.values():
        whole = found[keys[0]]
        if len(keys) > 1:
            rows = {name: torch.stack([found[key].tensors()[name] for key in keys]) for name in whole.tensors()}
            whole = whole.having(rows)
        head = keys[0].rpartition(".")[0]
        out[f"{head}.{BETWEEN.join(key.rpartition('.')[2] for key in keys)}"] = whole
    return out


def by_layer(found: Mapping[str, Statistic]) -> Found:
    """The same, with a statistic for each layer, in the order of layers."""
    out: Found = {}
    for key, stat in found.items():
        head, _, layers = key.rpartition(".")
        if BETWEEN not in layers:
            out[key] = stat
            continue
        rows = {name: x.unbind() for name, x in stat.tensors().items()}
        for i, layer in enumerate(layers.split(BETWEEN)):
            out[f"{head}.{layer}"] = stat.having({name: x[i] for name, x in rows.items()})
    return dict(sorted(out.items(), key=lambda item: int(item[0].rpartition(".")[2])))


def together(one: Found, other: Found) -> Found:
    """The statistics of both, layer by layer where not the same layers are stacked in both."""
    if not one or one.keys() == other.keys():
        return joined(one, other)
    odd = one.keys() ^ other.keys()
    rest = [by_layer({key: x for key, x in found.items() if key in odd}) for found in (one, other)]
    same = joined(*({key: x for key, x in found.items() if key not in odd} for found in (one, other)))
    return {**same, **stacked(joined(*rest))}
