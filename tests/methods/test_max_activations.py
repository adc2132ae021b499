"""Maxima against brute force over the hidden states that the model itself gives out."""

from functools import partial

import pytest
import torch

import heedful
from heedful import models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.core.figures import rounded
from heedful.methods.observe.max_activations import UNPLACED, MaxActivations, Maxima, Peaks
from tests import readers
from tests.readers import ids, padded

found = partial(readers.found, method=MaxActivations(5.0))


@pytest.fixture(scope="module")
def model():
    made = models.tiny("llama", num_hidden_layers=3)
    with torch.no_grad():  # one channel that a layer blows up
        made.model.layers[1].mlp.down_proj.weight[5] *= 300
    return made


def chunk_invariant(model, ids) -> list[torch.Tensor]:
    """The residual stream after each layer, `[b n e]`, without any hook of ours."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def test_small_and_large_activations_keep_their_digits() -> None:
    for size, told in ((0.00123456, "0.00123 in"), (4.5678, "4.57 in"), (12345.6, "12,346 in")):
        peaks = Peaks(torch.tensor([size]), torch.tensor([0]), torch.tensor(size / 2), torch.tensor(1))
        found = Maxima({0: peaks}, 1000.0)
        assert str(found) == f"largest activation {told} layer 0, 2 x the layer's mean magnitude"
        (finding,) = MaxActivations().describe(found).findings
        assert finding.text.startswith(f"The largest activation is {told.split()[0]} (2 × the mean), in channel 0")


def test_is_the_maximum_of_the_residual_stream(model) -> None:
    text = torch.cat([ids(20, 1), ids(20, 2)])
    maxima = found(model, {"input_ids": text})
    for n, stream in enumerate(chunk_invariant(model, text)):
        peaks, size = maxima.layers[n], stream.abs()
        assert close_model(peaks.high, size.amax((0, 1)))
        assert peaks.mean == pytest.approx(float(size.mean()), rel=1e-5)
        _, token, channel = torch.unravel_index(size.argmax(), size.shape)
        assert peaks.channel == channel
        assert peaks.place[channel] == token
        placed = peaks.place != UNPLACED
        assert 8 <= int(placed.sum()) <= 16
        for c in placed.nonzero()[:, 0]:
            assert close_model(size[:, peaks.place[c], c].max(), size[..., c].max())
    assert maxima.massive_channels() == {5: [1, 2]}
    assert maxima.massive_layers == [1, 2]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, padded(short, long, left))
    for n, peaks in apart.layers.items():
        assert close_model(together.layers[n].high, peaks.high)
        assert torch.equal(together.layers[n].place, peaks.place)
        assert together.layers[n].count == peaks.count == 28 * 32
        assert together.layers[n].mean == pytest.approx(peaks.mean, rel=1e-4)


def test_texts_merge_in_any_order(model) -> None:
    texts = [{"input_ids": ids(n, n)} for n in (5, 9, 13)]
    a, b = found(model, *texts), found(model, *reversed(texts))
    for n, peaks in a.layers.items():
        assert torch.equal(peaks.high, b.layers[n].high)
        assert torch.equal(peaks.place, b.layers[n].place)
        assert peaks.count == 27 * 32


def test_tells_the_massive_channel_and_its_layers(model) -> None:
    method = MaxActivations(5.0)
    told = method.describe(found(model, {"input_ids": ids(20)}))
    curves, listing = told.figures
    assert list(curves.x) == [0, 1, 2]
    assert [row[:4] for row in listing.rows] == [(5, 2, 1, 2)]
    assert "channel 5" in told.findings[0].text
    assert "67% of layers" in told.findings[0].text
    quiet = MaxActivations(1e6)
    told = quiet.describe(found(model, {"input_ids": ids(20)}, method=quiet))
    assert len(told.figures) == 1
    assert "no layer has massive" in told.findings[0].text


def test_decoding_steps_are_not_counted(model) -> None:
    method = MaxActivations()
    with heedful.attach(model, method) as run, torch.no_grad():
        run.generate(ids(6), max_new_tokens=4, do_sample=False)
        assert run[method].layers[0].count == 6 * 32


def test_the_threshold_lies_above_the_mean() -> None:
    with pytest.raises(FieldError, match=r"massive = 1\.0"):
        MaxActivations(1.0)


def _peaks(high: list[float], place: list[int], mean: float) -> Peaks:
    return Peaks(torch.tensor(high), torch.tensor(place), torch.tensor(10 * mean), torch.tensor(10.0))


def test_massive_is_above_the_threshold_times_the_mean_however_small() -> None:
    small = _peaks([0.25, 4.0], [0, 3], 0.5)
    assert small.ratio == 8.0
    layers = {0: _peaks([1.0, 8.0], [0, 3], 2.0), 1: small, 2: _peaks([0.0, 0.0], [0, 0], 0.0)}
    answer = Maxima(layers, 4.0)
    assert answer.massive_layers == [1]  # 4 times the mean is not above it
    assert answer.massive_channels() == {1: [1]}


def test_sums_are_one_for_all_channels() -> None:
    high, one = torch.zeros(2, 3), torch.zeros(2)
    assert Peaks(high, high, one, one).fits
    for other in (high, torch.zeros(())):
        assert not Peaks(high, high, other, other).fits


@pytest.mark.parametrize(("place", "words"), [(0, "the first token"), (3, "token 3"), (1, "token 1")])
def test_the_finding_names_the_token(place: int, words: str) -> None:
    answer = Maxima({0: _peaks([1.0, 8.0], [7, place], 2.0)}, 4.0)
    assert f"at {words};" in MaxActivations()._finding(answer).text


def test_magnitudes_have_no_digits_that_mean_nothing() -> None:
    told = [rounded(x) for x in (0.0, 3.4e-12, 0.00123, 1.0, 4.5678, 123.4, 12345.6, 1e6, 3.4e38)]
    assert told == ["0", "3.4e-12", "0.00123", "1", "4.57", "123", "12,346", "1e+06", "3.4e+38"]
