"""MedSteer: the turn away from a vector by loops, and vectors against outputs that hooks saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, fit, models
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.diffusion.med_steer import MedSteer

CROSS = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))


def _vectors(steps: tuple[int, ...] = (0, 2), layers: tuple[int, ...] = (0, 1), width: int = 32) -> Fitted:
    draw = torch.Generator().manual_seed(3)
    found = {f"v.{i}.{s}": torch.randn(width, generator=draw) for i in layers for s in steps}
    return Fitted({name: x / x.norm() for name, x in found.items()})


def _turned(x: Tensor, vector: Tensor, strength: float) -> Tensor:
    out = x.clone()
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            one = x[b, n]
            towards = float(sum(one[i] * vector[i] for i in range(len(one))))
            if towards > 0:
                moved = one - strength * towards * vector
                out[b, n] = moved * (one.norm() / moved.norm())
    return out


def _model() -> Any:
    return models.tiny("bart", attn_implementation="eager").eval()


def _inputs(seed: int = 0, n: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def _by_hand(model: Any, vectors: dict[int, Tensor], strength: float, inputs: dict[str, Tensor]) -> Tensor:
    handles = [
        decoder.encoder_attn.out_proj.register_forward_hook(
            lambda _, args, out, i=i: _turned(out, vectors[i], strength)  # type: ignore[misc]
        )
        for i, decoder in enumerate(model.model.decoder.layers)
    ]
    with torch.no_grad():
        found = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("strength", [1.0, 2.0, 3.5])
def test_cross_attention_turns_from_the_vector_of_its_layer_and_step(strength: float) -> None:
    model, inputs, vectors = _model(), _inputs(), _vectors()
    method = MedSteer(strength, vectors)
    with torch.no_grad(), attach(model, method, only=CROSS) as run:
        # a run that is not told the step is at the first; after the last step known, that one goes on
        for step, key in ((None, 0), (0, 0), (2, 2), (5, 2)):
            with run.paused():
                want = _by_hand(model, {i: vectors[f"v.{i}.{key}"] for i in range(2)}, strength, inputs)
            if step is None:
                found = run(**inputs).logits
            else:
                with run.denoising(step, of=9):
                    found = run(**inputs).logits
            assert close_model(found, want)


def test_a_drawn_vector_is_another_in_each_layer_and_step() -> None:
    model, inputs = _model(), _inputs()

    def drawn(seed: int, layer: int, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(1_000_003 * seed + 1009 * step + layer)
        x = torch.randn(32, generator=draw)
        return x / x.norm()

    with torch.no_grad(), attach(model, MedSteer(seed=2), only=CROSS) as run:
        for step in (0, 3):
            with run.paused():
                want = _by_hand(model, {i: drawn(2, i, step) for i in range(2)}, 2.0, inputs)
            with run.denoising(step, of=4):
                assert close_model(run(**inputs).logits, want)


def test_a_fit_takes_the_difference_of_means_at_each_step() -> None:
    model = _model()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    handles = [
        decoder.encoder_attn.out_proj.register_forward_hook(
            lambda _, args, out, i=i: seen[i].append(out.double())  # type: ignore[misc]
        )
        for i, decoder in enumerate(model.model.decoder.layers)
    ]
    batches: list[dict[str, Any]] = []
    for seed, (positive, step) in enumerate([(True, 0), (False, 0), (True, 0), (False, 3), (True, 3)]):
        batches.append({**_inputs(seed, n=5 + seed % 2), "positive": positive, "step": (step, 4)})
    batches[0]["step"] = [0, 4]  # as a file of JSON has it
    with torch.no_grad():
        for batch in batches:
            model(**{k: x for k, x in batch.items() if k not in ("positive", "step")})
    for handle in handles:
        handle.remove()
    found = fit(MedSteer(strength=1.5), model, batches, only=CROSS)
    assert found.strength == 1.5
    assert set(found.vectors) == {f"v.{i}.{s}" for i in range(2) for s in (0, 3)}
    for i in range(2):
        rows = [x.flatten(0, 1) for x in seen[i]]
        for step, with_it, without in ((0, (0, 2), (1,)), (3, (4,), (3,))):
            mean = torch.cat([rows[j] for j in with_it]).mean(0) - torch.cat([rows[j] for j in without]).mean(0)
            assert close_model(found.vectors[f"v.{i}.{step}"], (mean / mean.norm()).float())
    assert "positive" in batches[0], "what was given is as it was"


def test_padding_is_not_read() -> None:
    model, inputs = _model(), _inputs()
    mask = torch.ones_like(inputs["decoder_input_ids"])
    mask[:, 4:] = 0
    short = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :4]}
    other = {**_inputs(1), "positive": False}
    one, two = (
        fit(MedSteer(), model, [{**given, "positive": True}, other], only=CROSS)
        for given in (short, {**inputs, "decoder_attention_mask": mask})
    )
    for name, x in one.vectors.items():
        assert close_model(two.vectors[name], x)
        assert name in ("v.0.0", "v.1.0"), "a forward that is of no step counts as the first"


def test_self_attention_is_left_alone() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), attach(model, MedSteer(seed=0)) as run:
        assert torch.equal(run(**inputs).logits, model(**inputs).logits)
        run.state.changed.update(run.stack.steps())  # it changes nothing, as it should


class _Cross(nn.Module):
    """Cross-attention whose values are nothing, so that neither side differs from the other."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            self.v.weight.zero_()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q(x), self.k(context), self.v(context)))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Still(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross = _Cross()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.cross(x, context=context)


def test_a_concept_that_makes_no_difference_turns_nothing() -> None:
    torch.manual_seed(0)
    model, given = _Still(), {"x": torch.randn(2, 5, 8), "context": torch.randn(2, 3, 8)}
    batches = [{**given, "positive": side} for side in (True, False)]
    method = fit(MedSteer(), model, batches)
    assert all(float(v.norm()) == 0 for v in method.vectors.values())
    with torch.no_grad(), attach(model, method) as run:
        found = run(**given)
        run.state.changed.update(run.stack.steps())  # but for roundings it changes nothing, as it should
    assert close(found, model(**given))


def test_errors() -> None:
    model, inputs = _model(), _inputs()
    for strength in (-1.0, float("inf")):
        with pytest.raises(FieldError, match=r"MedSteer.strength = .*: must be 0 or more"):
            MedSteer(strength)
    with pytest.raises(FieldError, match="to forwards with and without the concept"), attach(model, MedSteer()) as run:
        run(**inputs)
    for vectors in (_vectors(layers=(0,)), _vectors(width=31)):
        wrong = MedSteer(1.0, vectors)
        with pytest.raises(FieldError, match="fit to this model"), attach(model, wrong, only=CROSS) as run:
            run(**inputs)
    with pytest.raises(FieldError, match="need 'positive' in each"):
        fit(MedSteer(), model, [inputs])
    both = [{**inputs, "positive": True}, {**inputs, "positive": False}]
    for batches in ([], both[:1], both[1:], [*both, {**inputs, "positive": False, "step": (1, 2)}]):
        with pytest.raises(FieldError, match="must hold, for each step, forwards with the concept and without"):
            fit(MedSteer(), model, batches)
