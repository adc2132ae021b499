"""Models and profiles that hold what is no number: a plain error that names the layer, and never a hang."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import Site, attach, edit, models
from heedful.core.errors import StatisticError
from heedful.core.stats import Statistic
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.run import diagnose
from heedful.methods.observe.attention_profile import AttentionProfile
from heedful.methods.observe.max_activations import MaxActivations

IDS = torch.arange(5, 25)


def poisoned(where: str) -> Any:
    model = models.tiny("llama")
    layer = model.model.layers[1]
    weight, value = {
        "weight": (layer.self_attn.q_proj.weight, torch.nan),
        "embedding": (model.model.embed_tokens.weight, torch.nan),
        "endless value": (layer.self_attn.v_proj.weight, torch.inf),
        "huge query": (layer.self_attn.q_proj.weight, 3e38),
    }[where]
    with torch.no_grad():
        weight[7 if where == "embedding" else slice(None)] = value
    return model


@pytest.mark.parametrize(("where", "layer"), [("weight", 1), ("embedding", 0), ("endless value", 1), ("huge query", 1)])
def test_a_model_with_what_is_no_number_is_refused_by_its_first_layer(where: str, layer: int, tmp_path: Path) -> None:
    with pytest.raises(StatisticError, match=rf"the heads of layer {layer} \(model.layers.{layer}.self_attn\) give"):
        diagnose(poisoned(where), IDS, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stream_with_what_is_no_number_is_refused_too(tmp_path: Path) -> None:
    model = models.tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:] = torch.nan  # after the last heads
    with pytest.raises(StatisticError, match=r"what MaxActivations.* found in layer 1 holds"):
        diagnose(model, IDS, measures=MaxActivations(), out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("site", [Site.QUERY, Site.KEY])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "native", "tiled", "reference"])
def test_an_edit_that_makes_no_numbers_gives_none_in_every_backend(site: Site, backend: str) -> None:
    """On a CPU torch's own kernel makes zeros of them, where keys are few."""
    model = models.tiny("llama")
    lost = edit(site, lambda x, call: x * torch.nan)
    with attach(model, lost.on(layers=1), backend=backend) as run:
        found = run(input_ids=IDS[None, :12]).logits
        assert bool(found.isnan().all())
        assert "NaN was seen" in str(run.activity())


def _filled(stat: Statistic, value: float) -> Statistic:
    sums = {name: x for name, x in stat.tensors().items() if name in ("total", "early")}
    return replace(stat, **{name: torch.full_like(x, value) for name, x in sums.items()})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_profile_holds_what_is_no_number(value: float) -> None:
    profile = diagnose(models.tiny("llama"), IDS, measures="SinkRate")
    bad = {k: _filled(s, value) if k.endswith(".1") else s for k, s in profile.statistics.items()}
    with pytest.raises(StatisticError, match=r"what SinkRate.* found in layer 1 holds infinity or what is no number"):
        Profile(profile.facts, profile.parts, bad)


def test_a_head_without_numbers_stands_alone() -> None:
    profile = diagnose(models.tiny("llama"), IDS, measures=AttentionProfile())
    answer = profile.answer(AttentionProfile())
    answer.distances[0][:, 2] = torch.nan
    groups = answer.groups(0.5)
    assert [(0, 2)] in groups
    assert sorted(head for group in groups for head in group) == [(n, h) for n in range(2) for h in range(4)]
