"""Codes head by head, what positive examples alone have counted by hand, and the autoencoder's first step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.methods.explain.circuit_codes import CircuitCodes, Codes, _unique
from tests.by_hand import Steps, causal_map, heads_of, llama_states
from tests.readers import ids, padded

METHOD = CircuitCodes(features=12, steps=40)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama")


def examples() -> list[dict]:
    return [
        {"input_ids": ids(7, 1, 4), "positive": [True, False, True, False]},
        {"input_ids": ids(9, 2, 3), "positive": torch.tensor([1, 0, 1])},
    ]


def means_of(model, text: Tensor) -> list[Tensor]:
    """What each head hands over, the mean over tokens, `[b h d]` by layer, of a llama written out."""
    found: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        heads = heads_of(causal_map(rotate(q), rotate(k)), v)
        found.append(sum(heads[:, :, n] for n in range(heads.shape[2])) / heads.shape[2])
        return heads

    with torch.no_grad():
        llama_states(model, text, attend)
    return found


def written_of(model, layer: int, head: int, mean: Tensor) -> Tensor:
    """What the output projection makes of it, `[e]`."""
    return model.model.layers[layer].self_attn.o_proj.weight.detach()[:, 8 * head : 8 * head + 8] @ mean


def code_of(x: Tensor, encoder: Tensor, bias: Tensor) -> int:
    fires = [max(0.0, float(sum(x * encoder[:, i])) + float(bias[i])) for i in range(len(bias))]
    return fires.index(max(fires))


def examples_of(model) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(*(means_of(model, x["input_ids"]) for x in examples()), strict=True)]


def test_a_code_is_the_feature_that_fires_most(model) -> None:
    method = heedful.fit(METHOD, model, examples())
    text = torch.cat([ids(8, 5), ids(8, 6)])
    with heedful.attach(model, method) as run, torch.no_grad():
        run(input_ids=text)
        run(input_ids=ids(5, 7))
        codes = run[method]
    assert codes.layers == (0, 1)
    assert codes.codes.shape == (3, 2, 4)
    means = [torch.cat(pair) for pair in zip(means_of(model, text), means_of(model, ids(5, 7)), strict=True)]
    for text_number in range(3):
        for layer in range(2):
            for head in range(4):
                wanted = code_of(
                    means[layer][text_number, head], method.sae[f"encoder.{layer}"][head], method.sae["bias"]
                )
                assert int(codes.codes[text_number, layer, head]) == wanted


def test_scores_count_what_positive_examples_alone_have(model) -> None:
    method = heedful.fit(METHOD, model, examples())
    positive = [True, False, True, False, True, False, True]
    with heedful.attach(model, method) as run, torch.no_grad():
        run(input_ids=ids(5))
        scores = run[method].scores
    assert len(set(scores.flatten().tolist())) > 1
    for layer, means in enumerate(examples_of(model)):
        for head in range(4):
            codes = [code_of(x[head], method.sae[f"encoder.{layer}"][head], method.sae["bias"]) for x in means]
            mine = {code for code, yes in zip(codes, positive, strict=True) if yes}
            others = {code for code, yes in zip(codes, positive, strict=True) if not yes}
            assert float(scores[layer, head]) == len(mine - others)


def test_codes_of_both_kinds_are_nobody_s() -> None:
    assert _unique([3, 3, 4, 5, 5], [True, False, True, True, True]) == 2
    assert _unique([1, 2, 7], [False, True, False]) == 1
    assert _unique([2, 2], [False, True]) == 0


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=0)


def test_the_autoencoder_is_trained_on_what_it_leaves_and_how_much_fires(model, monkeypatch) -> None:
    steps = Steps(monkeypatch, "Adam")
    method = CircuitCodes(features=6, penalty=0.3, rate=0.02, steps=3, seed=4)
    fitted = heedful.fit(method, model, examples())
    assert steps.settings == [{"lr": 0.02}]
    assert len(steps.grads) == 3
    encoder, decoder, bias, center = steps.before[0]
    assert (encoder.shape, decoder.shape) == ((32, 6), (6, 32))
    assert close(encoder.norm(dim=0), torch.ones(6))
    assert close(decoder.norm(dim=0), torch.ones(32))  # the authors' rows, one for each number that is rebuilt
    assert float(bias.abs().max()) < 32**-0.5
    assert len(set(bias.tolist())) == 6
    assert torch.equal(center, torch.zeros(32))
    x = torch.stack(
        [
            written_of(model, layer, head, text[head])
            for layer, means in enumerate(examples_of(model))
            for text in means
            for head in range(4)
        ]
    )
    for step in (0, 1):
        encoder, decoder, bias, center = (p.clone() for p in steps.before[step])
        learned = [p.requires_grad_() for p in (unit(encoder), unit(decoder), bias, center)]
        left, fires = torch.zeros(()), torch.zeros(())
        for row in x:
            fired = torch.clamp((row - learned[3]) @ learned[0] + learned[2], min=0)
            left = left + ((fired @ learned[1] + learned[3] - row) ** 2).sum()
            fires = fires + fired.abs().sum()
        (left / x.numel() + 0.3 * fires / len(x)).backward()
        for mine, theirs in zip(steps.grads[step], learned, strict=True):
            wanted = theirs.grad
            if theirs.ndim == 2:  # nothing of it goes along what keeps its length
                wanted = wanted - (wanted * theirs).sum(0) * theirs.detach()
            assert close(mine, wanted.detach())
    heedful.fit(CircuitCodes(features=6, penalty=0.3, rate=0.02, steps=4, seed=4), model, examples())
    last, _, bias, center = steps.before[6]  # what three steps came to, before a fourth
    for layer in range(2):
        o = model.model.layers[layer].self_attn.o_proj.weight.detach()
        for head in range(4):
            assert close(fitted.sae[f"encoder.{layer}"][head], o[:, 8 * head : 8 * head + 8].T @ last)
    assert close(fitted.sae["bias"], bias - center @ last)
    plain, zero = (heedful.fit(CircuitCodes(features=6, steps=1, seed=n), model, examples()) for n in (None, 0))
    assert plain.sae == zero.sae
    assert CircuitCodes() == CircuitCodes(features=200, penalty=0.02, rate=1e-3, steps=500)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_has_no_say(model, left: bool) -> None:
    method = heedful.fit(METHOD, model, examples())
    short, long = ids(6, 8), ids(9, 9)
    with heedful.attach(model, method) as run, torch.no_grad():
        run(input_ids=short)
        run(input_ids=long)
        apart = run[method].codes
        run.reset()
        run(**padded(short, long, left))
        assert torch.equal(run[method].codes, apart)


def test_nothing_is_coded_while_a_text_is_written(model) -> None:
    method = CircuitCodes(seed=1)
    with heedful.attach(model, method) as run:
        run.generate(input_ids=ids(6), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert run[method].codes.shape == (1, 2, 4)
        assert bool(run[method].scores.isnan().all())
        assert run[method].ranked == {}
        assert str(run[method]).endswith("by head none")


def test_without_a_fit_a_seed_draws_features(model) -> None:
    method = CircuitCodes(seed=3)
    with heedful.attach(model, method) as run, torch.no_grad():
        run(input_ids=ids(6))
        codes = run[method].codes
    encoder = unit(torch.randn(8, 16, generator=torch.Generator().manual_seed(3)))
    for layer, means in enumerate(means_of(model, ids(6))):
        assert codes[0, layer].tolist() == [code_of(x, encoder, torch.zeros(16)) for x in means[0]]


def test_where_no_feature_fires_the_code_is_the_first(model) -> None:
    each = torch.eye(8).expand(4, 8, 8)
    silent = CircuitCodes(sae=Fitted({"encoder.0": each, "encoder.1": each, "bias": torch.arange(8.0) - 20}))
    with heedful.attach(model, silent) as run, torch.no_grad():
        run(input_ids=ids(6))
        assert run[silent].codes.unique().tolist() == [0]


def test_tells_what_a_reader_wants_to_know() -> None:
    nan = float("nan")
    codes = Codes((0, 3), torch.zeros(5, 2, 3, dtype=torch.long), torch.tensor([[2.0, 0.0, 7.0], [0.0, 5.0, nan]]))
    assert list(codes.ranked) == [(0, 2), (3, 1), (0, 0), (0, 1), (3, 0)]
    assert str(codes).startswith("codes of 5 texts; codes of positive examples alone, by head 0.2 7, 3.1 5, 0.0 2")
    told = METHOD.describe(codes)
    (heads,) = told.figures
    assert heads.layers == (0, 3)
    assert (heads.low, heads.high, heads.unit) == (0, None, "")
    assert torch.equal(heads.values.nan_to_num(), codes.scores.nan_to_num())
    assert list(told.roles[0].heads.items())[:2] == [((0, 2), 7.0), ((3, 1), 5.0)]
    assert told.roles[0].unit == ""
    assert told.findings[0].text == (
        "Head 0.2 has the most codes that positive examples alone have, 7; 2 of 5 heads have none."
    )
    many = Codes((0,), codes.codes[:, :1], torch.arange(1.0, 13.0)[None])
    assert len(METHOD.describe(many).roles[0].heads) == 10
    assert str(many).endswith("0.3 4, 0.2 3")
    assert not METHOD.describe(Codes((0,), codes.codes, torch.full((1, 3), nan))).figures


def test_layers_of_unlike_width_are_filled_up() -> None:
    fitted = CircuitCodes(sae=Fitted({"bias": torch.zeros(8), "scores.0": torch.ones(4)}))
    from heedful.core.stats import Cat

    codes = fitted.answer({0: Cat.of("0", torch.ones(2, 4)), 1: Cat.of("0", torch.ones(2, 3))})
    assert codes.codes[0].tolist() == [[1, 1, 1, 1], [1, 1, 1, -1]]
    assert codes.scores[0].tolist() == [1.0] * 4
    assert bool(codes.scores[1].isnan().all())


def test_says_what_is_wrong(model) -> None:
    for field, bad in (("features", 1), ("steps", 0), ("penalty", -0.1), ("rate", 0.0)):
        with pytest.raises(FieldError, match=field):
            CircuitCodes(**{field: bad})
    assert CircuitCodes(features=2, steps=1, penalty=0.0).features == 2
    with pytest.raises(FieldError, match='must have "positive"'):
        heedful.fit(METHOD, model, [{"input_ids": ids(6)}])
    for alike in ([True, True], [False, False]):
        with pytest.raises(FieldError, match="positive examples and others"):
            heedful.fit(METHOD, model, [{"input_ids": ids(6, 1, 2), "positive": alike}])
    with heedful.attach(model, CircuitCodes()) as run, pytest.raises(FieldError, match="must be fitted"):
        run(input_ids=ids(6))
    for wrong in ({}, {"encoder.0": torch.zeros(4, 10, 8)}, {"encoder.0": torch.zeros(3, 8, 8)}):
        other = CircuitCodes(sae=Fitted({**wrong, "bias": torch.zeros(8)}))
        rule = "must be fitted to all heads of the layer, 4 of width 8 in layer 0"
        with heedful.attach(model, other) as run, pytest.raises(FieldError, match=rule):
            run(input_ids=ids(6))
    whole = {f"encoder.{layer}": torch.zeros(4, 8, 8) for layer in range(2)}
    some = CircuitCodes(sae=Fitted({**whole, "bias": torch.zeros(8)})).on(heads=[1, 2])
    with heedful.attach(model, some) as run, pytest.raises(FieldError, match=r", without \.on\(heads=\.\.\.\)"):
        run(input_ids=ids(6))


def test_one_label_is_that_of_all_texts_of_a_batch_and_others_must_be_as_many() -> None:
    model = models.tiny("llama")
    each = [
        {"input_ids": ids(6, 1, 2), "positive": [True, True]},
        {"input_ids": ids(6, 3, 2), "positive": [False, False]},
    ]
    one = [{**batch, "positive": batch["positive"][0]} for batch in each]
    few = CircuitCodes(features=6, steps=2)
    told, again = (heedful.fit(few, model, batches) for batches in (each, one))
    assert told == again
    for field in ({"penalty": float("inf")}, {"rate": float("inf")}):
        with pytest.raises(FieldError, match="and finite"):
            CircuitCodes(**field)
    with pytest.raises(FieldError, match="'positive' must be one label, or one for each of 2 texts"):
        heedful.fit(few, model, [{"input_ids": ids(6, 1, 2), "positive": [True, False, True]}])
