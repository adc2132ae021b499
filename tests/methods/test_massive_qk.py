"""Norms of queries and keys against those that the model's projections and rotary embedding give."""

import math
from functools import partial

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.observe.massive_qk import Massive, MassiveQK
from tests import readers
from tests.readers import ids, padded

METHOD = MassiveQK(1.6)
found = partial(readers.found, method=METHOD)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=2)


def test_is_the_norm_over_tokens(model) -> None:
    text = torch.cat([ids(20, 1), ids(20, 2)])
    massive = found(model, {"input_ids": text})
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(text))
        q, k = layer.self_attn.q_proj(x).unflatten(-1, (4, 8)), layer.self_attn.k_proj(x).unflatten(-1, (2, 8))
        cos, sin = model.model.rotary_emb(x, torch.arange(20)[None])

    def turned(y: torch.Tensor) -> torch.Tensor:
        a, b = y.transpose(1, 2).chunk(2, -1)
        return torch.cat([a, b], -1) * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    for got, y in ((massive.query[0], turned(q)), (massive.key[0], turned(k).repeat_interleave(2, 1))):
        norm = y.double().square().sum((0, 2)).sqrt()
        wanted = norm / norm.mean(-1, keepdim=True)
        assert close_model(got.float(), wanted.float())
    assert massive.dimensions(massive.query)[0] == sum(int((x[:, 0] > 1.6).sum()) for x in massive.query.values())
    assert massive.query_ratio.shape == massive.key_ratio.shape == (2, 4)


def test_measures_how_fast_each_dimension_turns(model) -> None:
    for n in (2, 3, 50):
        period = found(model, {"input_ids": ids(n)}).period
        wanted = [2 * math.pi * 10000 ** (j / 4) for j in range(4)] * 2
        assert all(period[layer].tolist() == pytest.approx(wanted, rel=1e-2) for layer in (0, 1))
    assert all(x.isnan().all() for x in found(models.tiny("gpt2"), {"input_ids": ids(9)}).period.values())
    alone = models.tiny("llama", num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    assert found(alone, {"input_ids": ids(9)}).period[0].tolist() == pytest.approx(wanted, rel=1e-2)


def test_layers_may_turn_at_unlike_speeds() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=kinds, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    massive = found(Gemma3ForCausalLM(config).eval(), {"input_ids": ids(40)}, method=MassiveQK(1.1))
    for layer, base in enumerate((1e4, 1e6)):
        assert float(massive.period[layer].max()) == pytest.approx(2 * math.pi * base ** (3 / 4), rel=1e-2)
    both = next(d for d, n in massive.dimensions(massive.query).items() if len(set(massive.turns(d)[0].tolist())) > 1)
    row = next(row for row in MassiveQK(1.1).describe(massive).figures[2].rows if row[0] == both)
    assert row[1] == " to ".join(f"{x:,.0f}" for x in sorted(massive.turns(both)[0].tolist()))


def test_a_planted_dimension_is_found_with_its_period() -> None:
    planted = models.tiny("llama", num_hidden_layers=2)
    with torch.no_grad():
        planted.model.layers[1].self_attn.q_proj.weight[8 + 3] *= 400  # dimension 3 of head 1
    method = MassiveQK(3.0)
    massive = found(planted, {"input_ids": ids(30)}, method=method)
    # the rotary embedding turns dimension 3 into 7 only once in 6283 tokens
    assert massive.dimensions(massive.query) == {3: 1}
    told = method.describe(massive)
    assert told.figures[2].rows == [(3, "6,283", 1, 0)]
    assert "12% of heads" in told.findings[0].text
    assert "dimension 3, of RoPE wavelength 6,283 (0% of dimensions have longer ones)" in told.findings[0].text
    unknown = {n: torch.full_like(x, math.nan) for n, x in massive.period.items()}
    still = Massive(massive.query, massive.key, unknown, 3.0)
    bare = method.describe(still).figures[2]  # of a model without rotary embedding
    assert (bare.columns, bare.rows) == (("dimension", "heads, queries", "heads, keys"), [(3, 1, 0)])
    assert "RoPE" not in bare.what
    assert "RoPE wavelength" in told.figures[2].columns
    none = MassiveQK(7.9)
    assert len(none.describe(found(planted, {"input_ids": ids(30)}, method=none)).figures) == 2


def test_layers_that_do_not_turn_leave_wavelengths_to_the_others() -> None:
    query, key = ({n: torch.tensor([[x, 1.0]]) for n in (0, 1)} for x in (4.0, 1.0))
    period = {0: torch.full((2,), math.nan), 1: torch.tensor([10.0, 20.0])}
    told = MassiveQK(3.0).describe(Massive(query, key, period, 3.0))
    assert told.figures[2].rows == [(0, "10", 2, 0)]
    assert "dimension 0, of RoPE wavelength 10 (50% of dimensions have longer ones)" in told.findings[0].text


def test_what_is_at_the_limit_is_not_above_it() -> None:
    query, key = ({0: torch.tensor(x)} for x in ([[4.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 3.0]]))
    (finding,) = MassiveQK(3.0).describe(Massive(query, key, {0: torch.full((2,), math.nan)}, 3.0)).findings
    assert "50% of heads" in finding.text
    assert "most often dimension 0." in finding.text
    assert finding.weight == pytest.approx(0.1 + 0.35 / 2)
    query, key = ({0: torch.tensor([[x, 1.0]]), 1: torch.tensor([[3.0, 1.0]])} for x in (4.0, 1.0))
    periods, longer = Massive(query, key, {n: torch.tensor([10.0 * n, 15.0]) for n in (0, 1)}, 3.0).turns(0)
    assert (periods.tolist(), longer.tolist()) == ([0.0], [0.5])  # of layer 0 alone


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    both = padded(short, long, left)
    if left:
        both["position_ids"] = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as `generate` gives them
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, both)
    for n in apart.query:
        assert close_model(together.query[n].float(), apart.query[n].float())
        assert close_model(together.key[n].float(), apart.key[n].float())
    for n, turns in apart.period.items():
        assert together.period[n].tolist() == pytest.approx(turns.tolist(), rel=1e-2)


def test_a_text_in_pieces_counts_each_token_once(model) -> None:
    whole = found(model, {"input_ids": ids(17)})
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        out = run(input_ids=ids(17)[:, :9], use_cache=True)
        run(input_ids=ids(17)[:, 9:], **{CACHE: out[CACHE]}, use_cache=True)
        pieces = run[METHOD]
    for n in whole.key:
        assert close_model(pieces.query[n].float(), whole.query[n].float())
        assert close_model(pieces.key[n].float(), whole.key[n].float())


def test_heads_and_decoding(model) -> None:
    some = METHOD.on(heads=[2, 3])
    with heedful.attach(model, some) as run, torch.no_grad():
        run.generate(ids(9), max_new_tokens=4, do_sample=False)
        got = run[some]
    whole = found(model, {"input_ids": ids(9)})
    assert close_model(got.key[0].float(), whole.key[0][2:].float())
    assert close_model(got.query[0].float(), whole.query[0][2:].float())


def test_the_threshold_lies_above_the_mean() -> None:
    with pytest.raises(FieldError, match="times"):
        MassiveQK(1.0)


def test_ratios_are_the_largest_and_massive_lies_above_the_threshold() -> None:
    query = {0: torch.tensor([[1.0, 4.0, 2.0], [3.0, 1.0, 1.0]]), 1: torch.tensor([[1.0, 5.0, 2.0], [1.0, 1.0, 1.0]])}
    key = {n: 2 * x for n, x in query.items()}
    answer = Massive(query, key, torch.ones(3), 3.0)
    assert answer.query_ratio.tolist() == [[4.0, 3.0], [5.0, 1.0]]
    assert answer.key_ratio.tolist() == [[8.0, 6.0], [10.0, 2.0]]
    assert answer.dimensions(query) == {1: 2}  # 3 is not above 3


def test_each_text_counts_alike_whatever_its_batch(model) -> None:
    texts = [ids(12, seed) for seed in (1, 2, 3)]
    apart = found(model, *({"input_ids": x} for x in texts))
    batches = found(model, {"input_ids": torch.cat(texts[:2])}, {"input_ids": texts[2]})
    for n in apart.key:
        assert close_model(batches.query[n].float(), apart.query[n].float())
        assert close_model(batches.key[n].float(), apart.key[n].float())
