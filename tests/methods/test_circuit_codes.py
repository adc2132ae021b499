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


def ends_of(model, text: Tensor) -> list[Tensor]:
    """What each head hands over at the last token, `[b h d]` by layer, of a llama written out."""
    found: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        heads = heads_of(causal_map(rotate(q), rotate(k)), v)
        found.append(heads[:, :, -1])
        return heads

    with torch.no_grad():
        llama_states(model, text, attend)
    return found


def code_of(end: Tensor, encoder: Tensor, bias: Tensor) -> int:
    end = end / sum(float(x) ** 2 for x in end) ** 0.5
    fires = [max(0.0, float(sum(end * encoder[:, i])) + float(bias[i])) for i in range(len(bias))]
    return fires.index(max(fires))


def test_a_code_is_the_feature_that_fires_most(model) -> None:
    method = heedful.fit(METHOD, model, examples())
    text = torch.cat([ids(8, 5), ids(8, 6)])
    with heedful.attach(model, method) as run, torch.no_grad():
        run(input_ids=text)
        run(input_ids=ids(5, 7))
        codes = run[method]
    assert codes.layers == (0, 1)
    assert codes.codes.shape == (3, 2, 4)
    ends = [torch.cat(pair) for pair in zip(ends_of(model, text), ends_of(model, ids(5, 7)), strict=True)]
    encoder, bias = method.sae["encoder"], method.sae["bias"]
    for text_number in range(3):
        for layer in range(2):
            for head in range(4):
                wanted = code_of(ends[layer][text_number, head], encoder, bias)
                assert int(codes.codes[text_number, layer, head]) == wanted


def test_scores_count_what_positive_examples_alone_have(model) -> None:
    method = heedful.fit(METHOD, model, examples())
    encoder, bias = method.sae["encoder"], method.sae["bias"]
    ends = [torch.cat(pair) for pair in zip(*(ends_of(model, x["input_ids"]) for x in examples()), strict=True)]
    positive = [True, False, True, False, True, False, True]
    with heedful.attach(model, method) as run, torch.no_grad():
        run(input_ids=ids(5))
        scores = run[method].scores
    assert len(set(scores.flatten().tolist())) > 1
    for layer in range(2):
        for head in range(4):
            codes = [code_of(end[head], encoder, bias) for end in ends[layer]]
            mine = {code for code, yes in zip(codes, positive, strict=True) if yes}
            others = {code for code, yes in zip(codes, positive, strict=True) if not yes}
            assert float(scores[layer, head]) == pytest.approx(len(mine - others) / len(mine | others))


def test_codes_of_both_kinds_are_nobody_s() -> None:
    assert _unique([3, 3, 4, 5, 5], [True, False, True, True, True]) == pytest.approx(2 / 3)
    assert _unique([1, 2], [False, True]) == 0.5
    assert _unique([2, 2], [False, True]) == 0.0


def test_the_autoencoder_is_trained_on_what_it_leaves_and_how_much_fires(model, monkeypatch) -> None:
    steps = Steps(monkeypatch, "Adam")
    method = CircuitCodes(features=6, penalty=0.3, rate=0.02, steps=3, seed=4)
    fitted = heedful.fit(method, model, examples())
    assert steps.settings == [{"lr": 0.02}]
    assert len(steps.grads) == 3
    encoder, decoder, bias = steps.before[0]
    assert close(encoder.norm(dim=0), torch.ones(6))
    assert torch.equal(decoder, encoder.T)
    assert torch.equal(bias, torch.zeros(6))
    start = torch.nn.functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(4)), dim=0)
    assert torch.equal(encoder, start)
    layers = [torch.cat(pair) for pair in zip(*(ends_of(model, x["input_ids"]) for x in examples()), strict=True)]
    x = torch.cat([layer.flatten(0, 1) for layer in layers])
    x = x / x.norm(dim=1, keepdim=True)
    learned = [p.clone().requires_grad_() for p in (encoder, decoder, bias)]
    total = torch.zeros(())
    for row in x:
        fired = torch.clamp(row @ learned[0] + learned[2], min=0)
        total = total + ((fired @ learned[1] - row) ** 2).sum() + 0.3 * fired.abs().sum()
    (total / len(x)).backward()
    for mine, theirs in zip(steps.grads[0], learned, strict=True):
        assert close(mine, theirs.grad)
    assert fitted.sae["encoder"].shape == (8, 6)
    assert not torch.equal(fitted.sae["encoder"], steps.before[2][0])  # the last step counts
    other = heedful.fit(CircuitCodes(features=6, steps=1), model, examples())
    assert close(other.sae["bias"].abs().amax(), torch.tensor(1e-2))  # one step at the default rate, from zero
    assert torch.equal(
        steps.before[3][0],
        torch.nn.functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), dim=0),
    )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_a_text_is_read_where_it_ends(model, left: bool) -> None:
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
    encoder = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(3)), dim=0)
    for layer, ends in enumerate(ends_of(model, ids(6))):
        assert codes[0, layer].tolist() == [code_of(end, encoder, torch.zeros(16)) for end in ends[0]]


def test_where_no_feature_fires_the_code_is_the_first(model) -> None:
    silent = CircuitCodes(sae=Fitted({"encoder": torch.eye(8), "bias": torch.arange(8.0) - 20}))
    with heedful.attach(model, silent) as run, torch.no_grad():
        run(input_ids=ids(6))
        assert run[silent].codes.unique().tolist() == [0]


def test_tells_what_a_reader_wants_to_know() -> None:
    nan = float("nan")
    codes = Codes((0, 3), torch.zeros(5, 2, 3, dtype=torch.long), torch.tensor([[0.2, 0.0, 0.75], [0.0, 0.5, nan]]))
    assert list(codes.ranked) == [(0, 2), (3, 1), (0, 0), (0, 1), (3, 0)]
    assert str(codes).startswith(
        "codes of 5 texts; codes of positive examples alone, by head 0.2 75%, 3.1 50%, 0.0 20%"
    )
    told = METHOD.describe(codes)
    (heads,) = told.figures
    assert heads.layers == (0, 3)
    assert (heads.low, heads.high) == (0, 1)
    assert torch.equal(heads.values.nan_to_num(), codes.scores.nan_to_num())
    assert list(told.roles[0].heads.items())[:2] == [((0, 2), 0.75), ((3, 1), 0.5)]
    assert told.findings[0].text == (
        "Head 0.2 does most that positive examples alone have, 75% of its codes; 2 of 5 heads do nothing of that kind."
    )
    many = Codes((0,), codes.codes[:, :1], torch.arange(1, 13)[None] / 20)
    assert len(METHOD.describe(many).roles[0].heads) == 10
    assert str(many).count("%") == 10
    assert not METHOD.describe(Codes((0,), codes.codes, torch.full((1, 3), nan))).figures


def test_layers_of_unlike_width_are_filled_up() -> None:
    fitted = CircuitCodes(sae=Fitted({"encoder": torch.eye(8), "bias": torch.zeros(8), "scores.0": torch.ones(4)}))
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
    wide = CircuitCodes(sae=Fitted({"encoder": torch.eye(10), "bias": torch.zeros(10)}))
    with heedful.attach(model, wide) as run, pytest.raises(FieldError, match="heads of width 10, and these are 8 wide"):
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
