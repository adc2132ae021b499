"""QuantVLA: the spread of scores and the size of outputs, taken from loops over a llama written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import fit, fold, models, operate
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods import RSQ, Absmax, PruneHeads, QuantVLA
from tests.by_hand import causal_map, heads_of, llama_states


def model_of() -> Any:
    return models.tiny("llama", dtype=torch.float64)


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 100, (3, 6))
    mask = torch.ones_like(ids[1:])
    mask[1, 4:] = 0
    return [{"input_ids": ids[:1]}, {"input_ids": ids[1:], "attention_mask": mask}]


def texts(given: list[dict[str, Tensor]]) -> list[Tensor]:
    return [given[0]["input_ids"][0], given[1]["input_ids"][0], given[1]["input_ids"][1, :4]]


def statistics(model: Any, given: list[dict[str, Tensor]]) -> tuple[list[list[float]], list[float]]:
    """Of each layer the standard deviation of each head's visible scores, and the root mean square of its output."""
    scores: list[list[list[float]]] = [[[] for _ in range(4)] for _ in range(2)]
    outputs: list[list[float]] = [[], []]

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        q, k = rotate(q), rotate(k)
        for h in range(4):
            for m in range(q.shape[2]):
                scores[i][h] += [float(q[0, h, m] @ k[0, h // 2, n]) / 8**0.5 for n in range(m + 1)]
        return heads_of(causal_map(q, k), v)

    hooks = [
        layer.self_attn.o_proj.register_forward_hook(
            lambda _, __, out, i=i: outputs[i].extend(out.flatten().tolist())  # type: ignore[misc]
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids in texts(given):
            llama_states(model, ids[None], attend)
    for hook in hooks:
        hook.remove()

    def spread(x: list[float]) -> float:
        mean = sum(x) / len(x)
        return (sum((y - mean) ** 2 for y in x) / len(x)) ** 0.5

    def size(x: list[float]) -> float:
        return (sum(y * y for y in x) / len(x)) ** 0.5

    return [[spread(x) for x in heads] for heads in scores], [size(x) for x in outputs]


def alpha_of(before: float, after: float) -> float:
    """The authors' tool: no less than 0.7 and no more than 1.4, and 1 where it is nearer to 1 than 0.02."""
    ratio = min(1.4, max(0.7, before / after))
    return 1.0 if abs(ratio - 1) < 0.02 else ratio


def beta_of(before: float, after: float) -> float:
    """The same for outputs, by logarithm: 0.3 to either side, and 1 within 0.03."""
    log = min(0.3, max(-0.3, -math.log(after / before)))
    return 1.0 if abs(log) < 0.03 else math.exp(log)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scores_first_then_outputs(bits: int) -> None:
    model, given = model_of(), batches()
    rounded = operate(model, Absmax(bits))
    (spread, size), (narrow, _) = statistics(model, given), statistics(rounded, given)
    alpha = [[alpha_of(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(spread, narrow, strict=True)]
    for layer, factors in zip(rounded.model.layers, alpha, strict=True):
        for h in range(4):
            layer.self_attn.q_proj.weight.data[8 * h : 8 * h + 8] *= factors[h]
    _, small = statistics(rounded, given)
    beta = [beta_of(a, b) for a, b in zip(size, small, strict=True)]
    for layer, factor in zip(rounded.model.layers, beta, strict=True):
        layer.self_attn.o_proj.weight.data *= factor
    found = fit(QuantVLA(Absmax(bits)), model, given)
    for i in range(2):
        assert close_model(found.scales[str(i)], torch.tensor([*alpha[i], beta[i]], dtype=torch.float64))
    calibrated = operate(model, found)
    for one, two in zip(calibrated.model.layers, rounded.model.layers, strict=True):
        for letter in "qkvo":
            assert close(*(getattr(x.self_attn, f"{letter}_proj").weight.detach() for x in (one, two)))


def test_scales_stay_within_limits_and_small_ones_are_left_out() -> None:
    model, given = model_of(), batches()
    with torch.no_grad():
        free = fit(QuantVLA(Absmax(2), scores=(1e-3, 1e3), reach=9.0, near=(0.0, 0.0)), model, given)
        bound = fit(QuantVLA(Absmax(2), scores=(0.95, 1.05), reach=0.1, near=(0.04, 0.05)), model, given)
    seen = set()
    for i in range(2):
        for h in range(4):
            wanted = min(1.05, max(0.95, float(free.scales[str(i)][h])))
            wanted = 1.0 if abs(wanted - 1) < 0.04 else wanted
            assert float(bound.scales[str(i)][h]) == pytest.approx(wanted)
            seen.add(round(wanted, 6))
        log = math.log(float(bound.scales[str(i)][4]))
        assert abs(log) == pytest.approx(0.1) or log == 0.0 or 0.05 <= abs(log) < 0.1
    assert {0.95, 1.05} <= seen


def test_biases_are_scaled_along_and_it_loads(tmp_path: Path) -> None:
    model = models.tiny("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.bias.normal_()
            block.attn.c_proj.bias.normal_()
    inputs = models.tiny_inputs(model)
    found = fit(QuantVLA(Absmax(2)), model, [inputs])
    calibrated, rounded = fold(model, found), operate(model, Absmax(2))
    for i, (one, two) in enumerate(zip(calibrated.transformer.h, rounded.transformer.h, strict=True)):
        scale = found.scales[str(i)].float()
        q = scale[:4].repeat_interleave(8)
        assert close(one.attn.c_attn.bias[:32], two.attn.c_attn.bias[:32] * q)
        assert torch.equal(one.attn.c_attn.bias[32:], two.attn.c_attn.bias[32:])
        assert close(one.attn.c_attn.weight[:, :32], two.attn.c_attn.weight[:, :32] * q)
        assert close(one.attn.c_proj.bias, two.attn.c_proj.bias * scale[4])
    calibrated.save_pretrained(tmp_path)
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)(**inputs).logits
        assert torch.equal(again, calibrated(**inputs).logits)


def test_without_rounding_nothing_changes() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    found = fit(QuantVLA(Absmax(projections="")), model, [inputs])
    assert all(bool((x == 1).all()) for x in found.scales.values())
    assert torch.equal(operate(model, found)(**inputs).logits, model(**inputs).logits)


def test_the_quantiser_is_fitted_too_and_silent_layers_stay() -> None:
    model = models.tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    found = fit(QuantVLA(RSQ(4)), model, [models.tiny_inputs(model)])
    assert isinstance(found.quantiser, RSQ)
    assert found.quantiser.found is not None
    assert found.scales["0"].tolist() == [1.0] * 5


def test_what_rounding_silences_stays_silent() -> None:
    model = model_of()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:8] *= 1e-3  # one head's, which one scale for all rounds to zero
    found = fit(QuantVLA(Absmax(2, "matrix")), model, [models.tiny_inputs(model)])
    assert float(found.scales["0"][0]) == 1.0
    assert float((found.scales["0"][1:4] - 1).abs().max()) > 0


def test_what_takes_heads_out_is_no_quantiser() -> None:
    model = models.tiny("llama")
    batch = {**models.tiny_inputs(model), "labels": models.tiny_inputs(model)["input_ids"]}
    with pytest.raises(FieldError, match=r"QuantVLA\.quantiser = PruneHeads.*: must leave every head in its place"):
        fit(QuantVLA(PruneHeads(groups=((0, 0), (1, 0)))), model, [batch])


def test_says_what_is_wrong() -> None:
    assert QuantVLA.example() == QuantVLA(Absmax(4))
    model = models.tiny("llama")
    for field, bad in (
        ("scores", (0.0, 1.4)), ("scores", (1.1, 1.4)), ("scores", (0.7, 0.9)), ("scores", (0.7, math.inf)),
        ("scores", (0.7,)), ("reach", -0.1), ("reach", math.inf), ("near", (-0.1, 0.1)), ("near", (0.1, math.inf)),
        ("near", (0.1,)),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=rf"QuantVLA\.{field} = "):
            QuantVLA(Absmax(4), **{field: bad})
    assert QuantVLA(scores=(1.0, 1.0), reach=0.0, near=(0.0, 0.0)).reach == 0
    with pytest.raises(FieldError, match=r"QuantVLA\.batches = 0"):
        fit(QuantVLA(Absmax(4)), model, [])
    with pytest.raises(FieldError, match=r"QuantVLA\.scales = None: must be of 4 heads in layer 0"):
        operate(model, QuantVLA(Absmax(4)))
    found = fit(QuantVLA(Absmax(4)), model, [models.tiny_inputs(model)])
    with pytest.raises(FieldError, match=r"QuantVLA\.scales = 4: must be of 2 heads in layer 0"):
        operate(models.tiny("llama", num_attention_heads=2), found)
    with pytest.raises(FieldError, match=r"QuantVLA\.scales = None: must be of 4 heads in layer 2"):
        operate(models.tiny("llama", num_hidden_layers=3), found)
