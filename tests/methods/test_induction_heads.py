"""The three scores against dense maps and against attention made by hand, and the prompts that they are taken on."""

from functools import partial

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.observe.induction_heads import SCORES, Copying, InductionHeads
from tests import readers
from tests.readers import ids, padded

METHOD = InductionHeads(period=5)
found = partial(readers.found, method=METHOD)
WORDS = torch.arange(3, 127)


def same(a: Copying, b: Copying) -> None:
    for score in SCORES:
        for layer, x in getattr(b, score).items():
            assert close(getattr(a, score)[layer].float().nan_to_num(), x.float().nan_to_num()), score


def by_hand(maps: Tensor, p: int) -> dict[str, Tensor]:
    """The scores from maps `[b h n n]`: each query's weight on its places, over the queries that have one."""
    out: dict[str, list[Tensor]] = {score: [] for score in SCORES}
    for text in maps.double():
        for q in range(text.shape[-1]):
            copies = [k for k in range(1, q) if (q - k) % p == 0]
            after = [k for k in range(1, q + 1) if (q - k + 1) % p == 0]
            for score, positions in (("echo", copies), ("induction", after), ("previous", [q - 1] if q > 1 else [])):
                if positions:
                    out[score].append(text[:, q, positions].sum(-1))
    return {score: torch.stack(x).mean(0) for score, x in out.items()}


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("length", [10, 23])
def test_is_what_the_maps_say(kind: str, length: int) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    inputs = models.tiny_inputs(model, batch=2, length=length)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    scores = found(model, inputs)
    for layer, x in enumerate(maps):
        for score, wanted in by_hand(x, 5).items():
            assert close(getattr(scores, score)[layer].float(), wanted.float()), score


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    model = models.tiny("llama")
    short, long = ids(8, 1), ids(14, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    same(found(model, padded(short, long, left)), apart)


def test_tiles_pieces_and_decoding_do_not_matter() -> None:
    model = models.tiny("llama")
    whole = found(model, {"input_ids": ids(17)})
    same(found(model, {"input_ids": ids(17)}, tile_rows=3, backend="tiled"), whole)
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        cache = run(input_ids=ids(17)[:, :7], use_cache=True)[CACHE]
        run(input_ids=ids(17)[:, 7:], **{CACHE: cache}, use_cache=True)
    same(run[METHOD], whole)
    with heedful.attach(model, METHOD) as run:
        run.generate(input_ids=ids(17), max_new_tokens=3, do_sample=False)
    same(run[METHOD], whole)


def test_a_text_without_repeats_has_no_copies() -> None:
    scores = found(models.tiny("llama"), {"input_ids": ids(5)})
    assert scores.induction[0].isnan().all()
    assert scores.echo[0].isnan().all()
    assert scores.previous[0].isfinite().all()
    assert METHOD.describe(scores).findings == ()
    assert "previous" in str(scores)


def test_draws_prompts_that_repeat() -> None:
    (probe,) = InductionHeads(period=7, repeats=4, texts=3).probes(WORDS, 512)
    assert probe.tokens.shape == (3, 28)
    assert torch.equal(probe.tokens[:, :7], probe.tokens[:, 21:])
    assert not torch.equal(probe.tokens[0], probe.tokens[1])
    assert set(probe.tokens.flatten().tolist()) <= set(WORDS.tolist())
    (again,) = InductionHeads(period=7, repeats=4, texts=3).probes(WORDS, 512)
    (other,) = InductionHeads(period=7, repeats=4, texts=3, seed=1).probes(WORDS, 512)
    assert torch.equal(again.tokens, probe.tokens)
    assert not torch.equal(other.tokens, probe.tokens)
    (fewer,) = InductionHeads(period=7, repeats=4).probes(WORDS, 20)
    assert fewer.tokens.shape == (1, 14)
    assert list(InductionHeads(period=7).probes(WORDS, 13)) == []


def test_finds_the_copying_heads_of_a_trained_model(default_model: models.Loaded) -> None:
    method = InductionHeads(period=32, repeats=2, texts=1)
    (probe,) = method.probes(torch.arange(1000, 40000), 128)
    scores = found(default_model.model, {"input_ids": probe.tokens}, method=method)
    (best, score), *_ = scores.heads("induction", method.share).items()
    assert best[0] > 8  # a head that copies needs the heads before it
    assert score > 0.6
    assert next(iter(scores.heads("previous", 0.3).values())) > 0.6


def test_tells_what_a_reader_wants_to_know() -> None:
    high = {0: torch.tensor([0.1, 0.2]), 3: torch.tensor([0.5, 0.9])}
    low = {n: x / 10 for n, x in high.items()}
    told = METHOD.describe(Copying(high, low, low))
    assert [figure.key for figure in told.figures] == ["induction", "echo", "previous"]
    assert told.figures[0].layers == [0, 3]
    assert torch.equal(told.figures[0].values, torch.stack(list(high.values())))
    roles = {role.name: list(role.heads) for role in told.roles}
    assert roles == {
        "induction head": [(3, 1), (3, 0)],
        "duplicate-token head": [],
        "previous-token head, synthetic text": [],
    }
    assert told.findings[0].text.startswith("Induction heads 3.1 (90%), 3.0 (50%):")
    assert told.findings[0].text.endswith("show 0 duplicate-token heads and 0 previous-token heads.")
    assert told.findings[0].weight == pytest.approx(0.4 + 0.4 * 0.9)
    assert METHOD.describe(Copying(low, low, low)).findings[0].weight == 0.1
    assert "No induction head" in METHOD.describe(Copying(low, low, low)).findings[0].text
    many = Copying({0: torch.full((7,), 0.5)}, low, low)
    assert "0.3 (50%) and 3 more:" in METHOD.describe(many).findings[0].text


@pytest.mark.parametrize(("name", "value"), [("period", 2), ("repeats", 1), ("texts", 0), ("share", 1.0)])
def test_says_what_is_wrong(name: str, value: float) -> None:
    with pytest.raises(FieldError, match=name):
        InductionHeads(**{name: value})


def test_heads_lie_strictly_above() -> None:
    scores = {0: torch.tensor([0.5, 0.25]), 1: torch.tensor([0.125, 0.75])}
    found = Copying(scores, {}, {}).heads("induction", 0.25)
    assert list(found.items()) == [((1, 1), 0.75), ((0, 0), 0.5)]
