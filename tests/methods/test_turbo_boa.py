"""TurboBoA: attention-aware rounding, written out with the whole Hessian of a head, and each of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import fit, fold, models, operate
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import TurboBoA
from tests.by_hand import block_inputs, causal_map, heads_of, llama_states

HEADS, GROUPS, D, WIDTH = 4, 2, 4, 16
ROWS, LACK = 3, 0.25


def small() -> Any:
    return models.tiny("llama", dtype=torch.float64, hidden_size=WIDTH, intermediate_size=2 * WIDTH)


def damp(h: Tensor) -> Tensor:
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def seen(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Of one text and each layer: inputs, turned queries and keys, heads, and each head's mixture of inputs."""
    found: list[dict[str, Any]] = []

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        weights = causal_map(rotate(q), rotate(k))
        heads = heads_of(weights, v)
        eye = torch.eye(D, dtype=torch.float64)
        turns = [rotate(eye[j].expand(1, 1, len(ids), D))[0, 0] for j in range(D)]  # [n d] each
        found.append({
            "q": rotate(q)[0], "k": rotate(k)[0], "o": heads[0].transpose(0, 1).flatten(1), "x": shown[i][0],
            "v": torch.stack([weights[0, h] @ shown[i][0] for h in range(HEADS)]),
            "R": [torch.stack([turns[j][n] for j in range(D)], 1) for n in range(len(ids))],
        })  # fmt: skip
        return heads

    with torch.no_grad(), block_inputs(model) as shown:
        llama_states(model, ids[None], attend)
    return found


def moments(whole: Any, now: Any, texts: list[Tensor], layer: int) -> dict[str, tuple[list[Tensor], ...]]:
    """For each projection H, D and K of each of its heads, summed token by token."""
    zero = lambda n: torch.zeros(n, n, dtype=torch.float64)  # noqa: E731
    h_x, d_x, h_o, d_o = zero(WIDTH), zero(WIDTH), zero(WIDTH), zero(WIDTH)
    h_v, d_v = [zero(WIDTH) for _ in range(GROUPS)], [zero(WIDTH) for _ in range(GROUPS)]
    k_q, k_k = [zero(D) for _ in range(HEADS)], [zero(D) for _ in range(GROUPS)]
    for ids in texts:
        a, b = seen(whole, ids)[layer], seen(now, ids)[layer]
        for n in range(len(ids)):
            h_x += torch.outer(b["x"][n], b["x"][n])
            d_x += torch.outer(a["x"][n] - b["x"][n], b["x"][n])
            h_o += torch.outer(b["o"][n], b["o"][n])
            d_o += torch.outer(a["o"][n] - b["o"][n], b["o"][n])
            for h in range(HEADS):
                h_v[h // 2] += torch.outer(b["v"][h, n], b["v"][h, n]) / 2
                d_v[h // 2] += torch.outer(a["v"][h, n] - b["v"][h, n], b["v"][h, n]) / 2
            for turn in b["R"]:
                for h in range(HEADS):
                    met = turn.T @ b["k"][h // 2, n]
                    k_q[h] += torch.outer(met, met) / len(ids)
                    met = turn.T @ b["q"][h, n]
                    k_k[h // 2] += torch.outer(met, met) / len(ids) / 2
    return {
        "q": ([h_x] * HEADS, [d_x] * HEADS, k_q), "k": ([h_x] * GROUPS, [d_x] * GROUPS, k_k),
        "v": (h_v, d_v, None), "o": ([h_o], [d_o], None),
    }  # fmt: skip


def grid(row: Tensor, h: Tensor, bits: int) -> tuple[float, int]:
    """The step and the code of zero that lose least by H."""
    low, high, top = min(0.0, float(row.min())), max(0.0, float(row.max())), 2**bits - 1
    whole = (high - low) / top
    zero, best = round(-low / whole), (float("inf"), 0.0)
    for i in range(80):
        step = whole * (1 - i / 100)
        error = step * ((row / step).round() + zero).clamp(0, top) - step * zero - row
        best = min(best, (float(error @ h @ error), step), key=lambda pair: pair[0])
    return best[1], zero


def upper(h: Tensor) -> Tensor:
    """u of the inverse u' u."""
    flip = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # upper, flip flip' = h
    return torch.linalg.inv(flip)


def columns(row: Tensor, h: Tensor, lack: Tensor, step: float, zero: int, bits: int) -> Tensor:
    """One row, column by column, those after each made to lose least and to say what its input lacks."""
    rest, out, u = row.clone(), torch.zeros_like(row), upper(h)
    for i in range(len(row)):
        now = rest[i].clone()
        out[i] = step * (max(0, min(2**bits - 1, round(float(now) / step) + zero)) - zero)
        later = torch.linalg.inv(h[i + 1 :, i + 1 :]) if i + 1 < len(row) else None
        if later is not None:
            rest[i + 1 :] -= (now - out[i]) / u[i, i] * u[i, i + 1 :]
            rest[i + 1 :] += now * (lack[i, i + 1 :] @ later)
    return out


def head(w: Tensor, h: Tensor, lack: Tensor, k: Tensor | None, bits: int, rows: int, passes: int) -> Tensor:
    h = damp(h)
    k = torch.eye(len(w), dtype=torch.float64) if k is None else damp(k)
    rest, out, steps = w.clone(), torch.zeros_like(w), torch.zeros(len(w), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    for start in range(0, len(w), rows):
        mine = list(range(start, min(start + rows, len(w))))
        later = list(range(start + rows, len(w)))
        for r in mine:
            step, zero = grid(rest[r], h, bits)
            out[r], steps[r] = columns(rest[r], h, lack, step, zero, bits), step
        if later:
            # the rows that are left take what makes tr(E H E' K) least, given what these lose and lack
            lost = rest[mine] - out[mine] + rest[mine] @ lack @ inverse
            left = k[start:, start:]
            size = len(mine)
            rest[later] += torch.linalg.inv(left[size:, size:]) @ left[size:, :size] @ lost
    codes = (out / steps[:, None]).round()
    for _ in range(passes):
        for r in range(len(w)):
            # the loss is a parabola in the step: its lowest point, from the slope
            step = steps[r].clone().requires_grad_()
            now = torch.stack([(step if i == r else steps[i]) * codes[i] for i in range(len(w))]) - w
            loss = (k * (now @ h @ now.T)).sum() - 2 * (k * (w @ lack @ now.T)).sum()
            (slope,) = torch.autograd.grad(loss, step, create_graph=True)
            (bend,) = torch.autograd.grad(slope, step)
            steps[r] = steps[r] - slope.detach() / bend
    return steps[:, None] * codes


def by_hand(texts: list[Tensor], bits: int, passes: int, rows: int = ROWS) -> Any:
    whole, now = small(), small()
    for i in range(2):
        found = moments(whole, now, texts, i)
        for letter, (h, lack, k) in found.items():
            weight = getattr(now.model.layers[i].self_attn, f"{letter}_proj").weight
            parts = weight.data.unflatten(0, (len(h), -1))
            new = [
                head(w, h[m], LACK * lack[m], None if k is None else k[m], bits, rows if k else len(w), passes)
                for m, w in enumerate(parts)
            ]
            weight.data = torch.cat(new)
    return now


def texts() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    ids = torch.randint(3, 100, (3, 7))
    return list(ids), [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]


@pytest.mark.parametrize(("bits", "passes"), [(2, 1), (3, 2)])
def test_the_rounded_model_is_the_papers(bits: int, passes: int) -> None:
    model = small()
    one_by_one, batches = texts()
    found = operate(model, fit(TurboBoA(bits, ROWS, LACK, passes), model, batches))
    wanted = by_hand(one_by_one, bits, passes)
    for one, two in zip(found.model.layers, wanted.model.layers, strict=True):
        for letter in "qkvo":
            a, b = (getattr(x.self_attn, f"{letter}_proj").weight for x in (one, two))
            assert close_model(a, b), letter


def test_padding_counts_for_nothing() -> None:
    model = small()
    ids = torch.randint(3, 100, (1, 7))
    padded = {"input_ids": torch.cat([ids, torch.zeros_like(ids[:, :2])], 1)}
    padded["attention_mask"] = torch.ones(1, 9, dtype=torch.long)
    padded["attention_mask"][:, 7:] = 0
    one, two = (fit(TurboBoA(), model, [batch]).found for batch in ({"input_ids": ids}, padded))
    assert all(close_model(x, two[name]) for name, x in one.items())


def test_only_what_is_named_is_rounded_and_it_loads(tmp_path: Path) -> None:
    model = models.tiny("llama")
    ids = torch.randint(3, 100, (2, 9))
    fitted = fit(TurboBoA(projections="ko", layers=(1,)), model, [{"input_ids": ids}])
    assert set(fitted.found) == {"1.k", "1.o"}
    rounded = fold(model, fitted)
    rounded.save_pretrained(tmp_path)
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)(input_ids=ids).logits
        assert torch.equal(again, rounded(input_ids=ids).logits)


def test_models_without_rotary_embedding_and_others() -> None:
    for kind in ("gpt2", "bert", "odd_head_dim"):
        model = models.tiny(kind)
        inputs = models.tiny_inputs(model)
        rounded = operate(model, fit(TurboBoA(3, layers=(1,)), model, [inputs]))
        with torch.no_grad():
            assert not torch.equal(rounded(**inputs).logits, model(**inputs).logits)


def test_says_what_is_wrong() -> None:
    for wrong in ({"rows": 0}, {"lack": -0.1}, {"lack": 1.1}, {"refinements": -1}, {"bits": 1}):
        with pytest.raises(FieldError, match=rf"TurboBoA\.{next(iter(wrong))} = "):
            TurboBoA(**wrong)
    assert TurboBoA() == TurboBoA(2, 16, 0.25, 1)
    assert TurboBoA(2, 1, 0.0, 0).rows == TurboBoA(lack=1.0).lack == 1
