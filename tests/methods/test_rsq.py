"""RSQ: GPTQ in a turned basis, whose Hessian weighs tokens by the attention they get, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import fit, fold, models, operate
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods import RSQ
from heedful.methods.compress.quantise.rsq import hadamard
from tests.by_hand import block_inputs, causal_map, heads_of, llama_states

LEAST, BITS, WIDTH = 0.1, 3, 16


def test_the_turn_is_orthogonal_and_of_equal_magnitudes() -> None:
    for width, block in ((8, 8), (12, 4), (5, 1)):
        turn = hadamard(width, 3)
        assert close(turn @ turn.T, torch.eye(width))
        for i in range(width):
            near = range(i // block * block, i // block * block + block)
            for j in range(width):
                assert torch.isclose(turn[i, j].abs(), torch.tensor(block**-0.5 if j in near else 0.0))
    assert len({tuple(hadamard(8, seed)[:, 0].sign().tolist()) for seed in range(20)}) > 5
    assert torch.equal(hadamard(8, 3), hadamard(8, 3))


def narrow() -> Any:
    return models.tiny("llama", dtype=torch.float64, hidden_size=WIDTH, intermediate_size=2 * WIDTH)


def inputs_of(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of one text and each layer: inputs of q, k and v `[n e]`, inputs of o `[n hd]`, and r `[n]`."""
    found: list[Any] = []

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        weights = causal_map(rotate(q), rotate(k))
        heads = heads_of(weights, v)
        got = [sum(float(weights[0, h, m, n]) for h in range(4) for m in range(len(ids))) for n in range(len(ids))]
        r = [LEAST + (1 - LEAST) * (a - min(got)) / (max(got) - min(got)) for a in got]
        found.append((heads[0].transpose(0, 1).flatten(1), torch.tensor(r, dtype=torch.float64)))
        return heads

    with torch.no_grad(), block_inputs(model) as shown:
        llama_states(model, ids[None], attend)
    return [(x[0], y, r) for x, (y, r) in zip(shown, found, strict=True)]


def gptq(w: Tensor, hessian: Tensor) -> Tensor:
    """Column by column; those that are left then take what makes the loss least."""
    n = len(hessian)
    turn = hadamard(n, 0).double()
    h, w = turn.T @ hessian @ turn, w @ turn
    h = h + 0.01 * h.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    out = torch.zeros_like(w)
    for o in range(len(w)):
        whole = float(w[o].abs().max()) / 3
        steps = [whole * (1 - i / 100) for i in range(80)]
        losses = [sum(abs(x - s * max(-4, min(3, round(x / s)))) ** 2.4 for x in w[o].tolist()) for s in steps]
        step = steps[losses.index(min(losses))]
        rest = w[o].clone()
        for i in range(n):
            out[o, i] = step * max(-4, min(3, round(float(rest[i]) / step)))
            error = out[o, : i + 1] - w[o, : i + 1]
            rest[i + 1 :] = w[o, i + 1 :] - torch.linalg.solve(h[i + 1 :, i + 1 :], h[i + 1 :, : i + 1] @ error)
    return out @ turn.T


def by_hand(texts: list[Tensor]) -> Any:
    """Layer by layer, and in each first q, k and v, then o."""
    model = narrow()
    for i, layer in enumerate(model.model.layers):
        part = layer.self_attn
        for letters in ("qkv", "o"):
            hessian = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
            for ids in texts:
                x, y, r = inputs_of(model, ids)[i]
                shown = x if letters == "qkv" else y
                for n in range(len(ids)):
                    hessian += r[n] ** 2 * torch.outer(shown[n], shown[n])
            for letter in letters:
                weight = getattr(part, f"{letter}_proj").weight
                weight.data = gptq(weight.data, hessian)
    return model


def test_the_rounded_model_is_the_papers() -> None:
    model = narrow()
    ids = torch.randint(3, 100, (3, 9))
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    found = operate(
        model,
        fit(RSQ(BITS, LEAST), model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:], "attention_mask": mask[1:]}]),
    )
    wanted = by_hand([ids[0], ids[1], ids[2, 3:]])
    for one, two in zip(found.model.layers, wanted.model.layers, strict=True):
        for letter in "qkvo":
            a, b = (getattr(x.self_attn, f"{letter}_proj").weight for x in (one, two))
            assert close_model(a, b), letter


def test_only_what_is_named_is_rounded_and_it_loads(tmp_path: Path) -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (2, 9))
    fitted = fit(RSQ(projections="vo", layers=(1,)), model, [{"input_ids": ids}])
    assert set(fitted.found) == {"1.v", "1.o"}
    small = fold(model, fitted)
    changed = {name for name, x in small.state_dict().items() if not torch.equal(x, model.state_dict()[name])}
    assert changed == {f"model.layers.1.self_attn.{x}_proj.weight" for x in "vo"}
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)(input_ids=ids).logits
        assert torch.equal(again, small(input_ids=ids).logits)


def test_a_text_of_one_token_counts_by_the_least() -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (1, 1))
    fitted = fit(RSQ(layers=(0,)), model, [{"input_ids": ids}])
    assert all(bool(x.isfinite().all()) for x in fitted.found.values())


def test_other_models_and_other_turns() -> None:
    for kind in ("gpt2", "bert", "mqa", "odd_head_dim"):
        model = models.tiny(kind)
        inputs = models.tiny_inputs(model)
        small = operate(model, fit(RSQ(4), model, [inputs]))
        with torch.no_grad():
            assert not torch.equal(small(**inputs).logits, model(**inputs).logits)
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    one, two = (fit(RSQ(seed=seed, layers=(0,)), model, [inputs]).found for seed in (0, 1))
    assert not torch.equal(one["0.q"], two["0.q"])


def test_says_what_is_wrong() -> None:
    for wrong in ({"bits": 1}, {"bits": 9}, {"least": 0.0}, {"least": 1.1}, {"projections": "z"}):
        with pytest.raises(FieldError, match=rf"RSQ\.{next(iter(wrong))} = "):
            RSQ(**wrong)
    assert RSQ(2, 1.0).least == 1
    assert (RSQ().bits, RSQ().least, RSQ().seed) == (3, 0.005, 0)
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=r"RSQ\.batches = 0"):
        fit(RSQ(), model, [])
    with pytest.raises(FieldError, match=r"RSQ\.found = None: is not known yet"):
        operate(model, RSQ())
    inputs = models.tiny_inputs(model)
    fitted = fit(RSQ(layers=(0,), projections="k"), model, [inputs])
    with pytest.raises(FieldError, match=r"RSQ\.found = \(16, 32\): must be \(32, 32\) for projection k of layer 0"):
        operate(models.tiny("mha"), fitted)
    with pytest.raises(FieldError, match=r"RSQ\.found = None: must be \(16, 32\) for projection k of layer 1"):
        operate(model, RSQ(projections="k", found=fitted.found))
