"""ControlMLLM: the energy of a marked region, and the steps of the latent against the model called by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.vision.control_mllm import ControlMLLM, _Energy

N = 14
ROLES = {"image": ((1, 4), (5, 9)), "marked": ((3, 6), (10, 11)), "question": ((10, 12),)}
IMAGE, PART = [1, 2, 3, 5, 6, 7, 8], [3, 5]  # what is marked outside the image is no part of it


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.tiny("llama", num_hidden_layers=3, attn_implementation="eager").to(dtype).eval()


def _ids(model: nn.Module, batch: int = 2) -> Tensor:
    return models.tiny_inputs(model, batch=batch, length=N)["input_ids"]


def _energy(attentions: Any, asks: range, layers: tuple[int, ...], first: int = 0) -> Tensor:
    """By loops, of texts whose first token stands in column `first`."""
    total = torch.zeros((), dtype=attentions[0].dtype)
    rows = len(attentions[0])
    for b in range(rows):
        part = whole = 0.0
        for layer in layers:
            for h in range(attentions[layer].shape[1]):
                for q in asks:
                    for k in IMAGE:
                        weight = attentions[layer][b, h, first + q, first + k]
                        whole = whole + weight
                        part = part + (weight if k in PART else 0.0)
        total = total + (1 - part / whole) ** 2 / rows
    return total


@pytest.mark.parametrize(
    ("energy", "asks", "layers"),
    [
        (_Energy(), range(9, N), (0, 1, 2)),
        (_Energy(question="question"), range(10, 12), (0, 1, 2)),
        (_Energy(layers=(1,)), range(9, N), (1,)),
        (_Energy(layers=(2, 0)), range(9, N), (0, 2)),
    ],
    ids=repr,
)
def test_the_energy_by_loops(energy: _Energy, asks: range, layers: tuple[int, ...]) -> None:
    model = _model()
    ids = _ids(model)
    with torch.no_grad(), attach(model, energy, roles=ROLES) as run:
        out = run(input_ids=ids, output_attentions=True, use_cache=True)
        want = _energy(out.attentions, asks, layers)
        assert 0.1 < float(want) < 1
        assert close(run.loss(), want)
        pad = torch.zeros(2, 4, dtype=torch.long)
        for parts in ((pad, ids), (ids, pad)):
            padded = torch.cat(parts, 1)
            run(input_ids=padded, attention_mask=(padded > 0).long())
            assert close_model(run.loss(), want)


def test_nobody_who_asks_is_no_energy_of_a_number_that_is_none() -> None:
    model = _model()
    with torch.no_grad(), attach(model, _Energy(), roles=ROLES) as run:
        run(input_ids=_ids(model)[:, :8])
        assert float(run.loss()) == 1.0


def _reweighted(model: nn.Module, ids: Tensor, latent: Tensor, **more: Any) -> Any:
    """The model with the latent on the image's tokens, without heedful."""
    x = model.get_input_embeddings()(ids)
    return model(inputs_embeds=x.index_add(1, torch.tensor(IMAGE), latent.expand(len(ids), -1, -1)), **more)


def _slope(model: nn.Module, ids: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    latent = latent.detach().requires_grad_()
    found = _energy(_reweighted(model, ids, latent, output_attentions=True).attentions, range(9, N), (0, 1, 2))
    return found.detach(), torch.autograd.grad(found, latent)[0]


def _steps(model: nn.Module, ids: Tensor, count: int, rate: float, blend: float) -> tuple[Tensor, list[Tensor]]:
    """The authors' order: one leaf, blended with what was added before, and that at first the leaf itself."""
    leaf = torch.zeros(len(IMAGE), 32, dtype=torch.float64)
    before, energies = None, []
    for _ in range(count):
        leaf = leaf.detach().requires_grad_()
        added = blend * leaf + (1 - blend) * (leaf if before is None else before)
        attentions = _reweighted(model, ids, added, output_attentions=True).attentions
        energy = _energy(attentions, range(9, N), (0, 1, 2))
        energies.append(energy.detach())
        (slope,) = torch.autograd.grad(energy, leaf)
        before, leaf = added.detach(), leaf - rate * slope
    return (blend * leaf + (1 - blend) * before).detach(), energies


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_steps_are_the_authors(steps: int) -> None:
    model = _model(torch.float64)
    ids, blend = _ids(model, batch=1), 0.7
    _, slope = _slope(model, ids, torch.zeros(len(IMAGE), 32, dtype=torch.float64))
    rate = 0.3 / float(slope.norm())
    want, energies = _steps(model, ids, steps, rate, blend)
    assert all(a > b for a, b in itertools.pairwise(energies))
    method = ControlMLLM(steps=steps, rate=rate, blend=blend, enough=1e9)
    batch = {"input_ids": ids, "roles": ROLES}
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = fit(method, model, [batch])
    assert close_model(found.latent["latent"].float(), want.float())
    if steps == 1:
        assert close_model(found.latent["latent"].float(), -(blend * rate * slope).float())
    assert found == fit(method, model, [batch])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_fit_ends_once_the_energy_has_changed_enough() -> None:
    model = _model(torch.float64)
    ids = _ids(model, batch=1)
    _, slope = _slope(model, ids, torch.zeros(len(IMAGE), 32, dtype=torch.float64))
    rate = 0.3 / float(slope.norm())
    _, energies = _steps(model, ids, 4, rate, 0.5)
    fallen = [float(1 - e / energies[0]) for e in energies]
    assert fallen[1] < fallen[2] < fallen[3]
    for enough, steps in (((fallen[1] + fallen[2]) / 2, 2), (fallen[1] / 2, 1), (2 * fallen[3], 4)):
        found = fit(ControlMLLM(rate=rate, enough=enough), model, [{"input_ids": ids, "roles": ROLES}])
        want, _ = _steps(model, ids, steps, rate, 0.5)
        assert close_model(found.latent["latent"].float(), want.float())


def test_the_latent_is_added_to_the_images_tokens_wherever_they_stand() -> None:
    model = _model()
    ids = _ids(model)
    latent = torch.randn(len(IMAGE), 32, generator=torch.Generator().manual_seed(1))
    method = ControlMLLM(latent=Fitted({"latent": latent}))
    with torch.no_grad(), attach(model, method, roles=ROLES) as run:
        want = _shifted_alone(ids, latent)
        assert close_model(run(input_ids=ids).logits, want)
        pad = torch.zeros(2, 4, dtype=torch.long)
        padded = torch.cat([pad, ids], 1)
        assert close_model(run(input_ids=padded, attention_mask=(padded > 0).long()).logits[:, 4:], want)
        cache, parts = None, []
        for start, stop in ((0, 6), (6, 7), (7, N)):
            out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
        assert close_model(torch.cat(parts, 1), want)


def _shifted_alone(ids: Tensor, latent: Tensor) -> Tensor:
    return _reweighted(_model(), ids, latent).logits


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"role": ""}, r"ControlMLLM\.role"),
        ({"image": ""}, r"ControlMLLM\.image"),
        ({"steps": -1}, r"ControlMLLM\.steps"),
        ({"rate": 0.0}, r"ControlMLLM\.rate"),
        ({"blend": 0.0}, r"ControlMLLM\.blend"),
        ({"blend": 1.5}, r"ControlMLLM\.blend"),
        ({"enough": 0.0}, r"ControlMLLM\.enough"),
        ({"layers": ()}, r"ControlMLLM\.layers"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        ControlMLLM(**settings)


def test_a_latent_belongs_to_one_prompt() -> None:
    model = _model()
    ids = _ids(model, batch=1)
    with pytest.raises(FieldError, match=r'batches = 2: must be one prompt, with roles naming "image" and "marked"'):
        fit(ControlMLLM(), model, [{"input_ids": ids, "roles": ROLES}] * 2)
    with pytest.raises(FieldError, match="must be one prompt"):
        fit(ControlMLLM(), model, [{"input_ids": ids, "roles": {"image": ((0, 4),)}}])
    with (
        attach(model, ControlMLLM(), roles=ROLES) as run,
        pytest.raises(FieldError, match="to the prompt, or seed be given"),
    ):
        run(input_ids=ids)
    other = ControlMLLM(latent=Fitted({"latent": torch.ones(3, 32)}))
    with attach(model, other, roles=ROLES) as run, pytest.raises(FieldError, match=r"\[n e\] is \[7, 32\] here"):
        run(input_ids=ids)
    with pytest.raises(FieldError, match=r"layers = 3: must be below 3"):
        fit(ControlMLLM(layers=(1, 3)), model, [{"input_ids": ids, "roles": ROLES}])
