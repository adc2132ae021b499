"""Attention buckets against models that were built with each rotary base, with padding, caches and the mixing rule."""

import pytest
import torch

import heedful
from heedful import Prompt, catalogue, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.attention_buckets import AttentionBuckets, _Rebase
from tests.readers import ids


def based(base: float, kind: str = "llama"):
    rope = {"rope_type": "default", "rope_theta": base}
    return models.tiny(kind, num_hidden_layers=3, rope_parameters=rope)


@pytest.mark.parametrize("kind", ["llama", "mha", "mqa", "odd_head_dim", "qwen3"])
def test_turning_equals_a_model_of_that_base(kind: str) -> None:
    model, other = based(10000.0, kind), based(200.0, kind)
    inputs = {"input_ids": ids(30)}
    with torch.no_grad(), heedful.attach(model, _Rebase(10000.0, 200.0)) as run:
        found = run(**inputs).logits
    with torch.no_grad():
        wanted, own = other(**inputs).logits, model(**inputs).logits
    assert close_model(found, wanted)
    assert not close_model(found, own)


@pytest.mark.usefixtures("poison")
def test_turning_counts_text_positions() -> None:
    model, text = based(10000.0), ids(12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), text], 1)
    mask = (torch.arange(17) >= 5).long()[None]
    with torch.no_grad(), heedful.attach(model, _Rebase(10000.0, 200.0)) as run:
        assert close_model(run(input_ids=padded, attention_mask=mask).logits[:, 5:], run(input_ids=text).logits)


def test_part_of_a_head_can_be_turned() -> None:
    x, place = torch.randn(1, 2, 6, 8), torch.arange(6)[None, None]
    found = _Rebase(10000.0, 200.0, 4)._turn(x, place)
    assert torch.equal(found[..., 4:], x[..., 4:])
    assert close(found[..., :4], _Rebase(10000.0, 200.0)._turn(x[..., :4], place))
    assert close(found.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(_Rebase(500.0, 500.0)._turn(x, place), x)
    with pytest.raises(FieldError, match="even and at most 8"):
        _Rebase(10000.0, 200.0, 10)._turn(x, place)


def test_decodes_as_a_mix_of_models() -> None:
    model, bases = based(10000.0), (10000.0, 200.0, 50.0)
    others = [based(base) for base in bases]
    text, wanted = list(ids(11)[0].tolist()), []
    for _ in range(6):  # from the whole text each time, without a cache
        with torch.no_grad():
            each = torch.stack([m(torch.tensor([text + wanted])).logits[0, -1] for m in others])
        weight = torch.softmax(each.max(-1).values, 0)
        assert weight.max() < 0.999
        wanted.append(int((weight[:, None] * each).sum(0).argmax()))
    assert heedful.decode(model, Prompt(tuple(text)), AttentionBuckets(10000.0, bases), new_tokens=6) == tuple(wanted)


def test_mixes_by_confidence() -> None:
    sure, unsure = torch.tensor([0.0, 9.0, 0.0]), torch.tensor([1.0, 0.0, 0.5])
    found = AttentionBuckets().combine({"a": sure, "b": unsure})
    weight = torch.softmax(torch.tensor([9.0, 1.0]), 0)
    assert close(found, weight[0] * sure + weight[1] * unsure)
    assert close(AttentionBuckets().combine({"b": unsure, "a": sure}), found)
    half = {"a": sure.bfloat16(), "b": unsure.bfloat16()}
    assert AttentionBuckets().combine(half).dtype == torch.float32


def test_neutral_is_the_model_to_the_bit_and_example_is_not() -> None:
    model, prompt = based(10000.0), Prompt(tuple(ids(9)[0].tolist()))
    with torch.no_grad():
        own = model(torch.tensor([prompt.tokens])).logits[0, -1]
    for step, equal in ((AttentionBuckets.neutral(), True), (AttentionBuckets.example(), False)):
        logits = {}
        for name, (shown, stack) in step.variants(prompt).items():
            with heedful.attach(model, stack) as run, torch.no_grad():
                logits[name] = run(torch.tensor([shown.tokens])).logits[0, -1]
        assert torch.equal(step.combine(logits), own) is equal
    assert list(AttentionBuckets().variants(prompt))[:2] == ["base 10000.0", "base 17500.0"]
    assert len(set(AttentionBuckets(bases=(10000.0, 10000.001)).variants(prompt))) == 2


def test_says_what_is_wrong() -> None:
    with pytest.raises(FieldError, match=r"base = 1\.0: must be above 1"):
        AttentionBuckets(base=1.0)
    for bad in ((), (10000.0, 10000.0), (10000.0, 0.5)):
        with pytest.raises(FieldError, match="unlike numbers above 1"):
            AttentionBuckets(bases=bad)
    for bad in (0, 7):
        with pytest.raises(FieldError, match="even number of dimensions"):
            AttentionBuckets(rotary=bad)


def test_the_catalogue_lists_the_step_and_not_its_method() -> None:
    listed = catalogue.entries()
    assert listed["AttentionBuckets"] is AttentionBuckets
    assert not any("Rebase" in name for name in listed)
