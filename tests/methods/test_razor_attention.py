"""RazorAttention: copying heads keep all, the others a token that stands for what they dropped."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import CachedKV, Call, Phase
from heedful.core.errors import FieldError, SiteError
from heedful.core.fitted import Fitted
from heedful.core.mask import Causal, Mask
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods.sparse.cache.razor_attention import RazorAttention
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from tests.samples import notes_in

N, D, DV = 14, 6, 4
SCORES = Fitted({"induction.0": torch.tensor([0.1, 0.9]), "echo.0": torch.tensor([0.2, 0.1])})
NOBODY = RazorAttention(budget=3, least=1, sinks=2, induction=0.0, echo=0.0, scores=SCORES)


def _draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _call(queries: Positions, keys: Positions, query: Tensor, key: Tensor, state: State) -> Call:
    phase = Phase.DECODE if len(queries) == 1 else Phase.PREFILL
    return Call(
        0, 1, "layer", 4, 2, queries, keys, D**-0.5, phase=phase, mask=Mask((Causal(),)), state=state,
        query=query, key=key,
    )  # fmt: skip


def _read(method: RazorAttention, state: State) -> tuple[Tensor, CachedKV]:
    key, value, positions = _draw(2, 2, N, D), _draw(2, 2, N, DV, seed=1), Positions.row(0, N)
    entries = CachedKV(key, value, positions, N)
    return method.drop(entries, _call(positions, positions, _draw(2, 4, N, D), key, state)), entries


def test_what_stays() -> None:
    protected = replace(NOBODY, induction=0.5)
    for method, want in ((NOBODY, [5, 5]), (protected, [5, N]), (replace(protected, echo=0.5), [N, N])):
        kept, _ = _read(method, State())
        assert kept.sum(-1).tolist() == [want, want]
    kept, _ = _read(NOBODY, State())
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 1, N - 3, N - 2, N - 1]
    for budget, least, most in ((0.5, 1, 7), (0.5, 9, 9), (2, 1, 2)):
        kept, _ = _read(replace(NOBODY, budget=budget, least=least), State())
        assert int(kept[0, 0].sum()) == 2 + most


def _after(method: RazorAttention, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What new queries, more than a head is wide, get without compensation, with it, and by the formula."""
    state = State()
    kept, entries = _read(method, state)
    new = DV + 1
    query, key, value = _draw(2, 4, new, D, seed=2), _draw(2, 2, new, D, seed=3), _draw(2, 2, new, DV, seed=4)
    order = (~kept).long().argsort(dim=-1, stable=True)[..., : int(kept.sum(-1).amax())]
    is_filled = torch.cat([kept.gather(-1, order), torch.ones(2, 2, new, dtype=torch.bool)], -1)
    index = torch.cat([order, torch.arange(N, N + new).expand(2, 2, new)], -1)
    keys = torch.cat([entries.key.gather(2, order[..., None].expand(*order.shape, D)), key], 2)
    values = torch.cat([entries.value.gather(2, order[..., None].expand(*order.shape, DV)), value], 2)
    call = _call(Positions.row(N, new), Positions(index, index, is_filled=is_filled), query, keys, state)
    call = replace(call, softcap=softcap)
    plain, want = torch.zeros(2, 4, new, DV), torch.zeros(2, 4, new, DV)

    def score(q: Tensor, k: Tensor) -> float:
        s = float(q @ k) / math.sqrt(D)
        return s if softcap is None else softcap * math.tanh(s / softcap)

    for b in range(2):
        for h in range(4):
            g = h // 2
            gone = ~kept[b, g]
            for r in range(new):
                seen = [i for i in range(keys.shape[2]) if is_filled[b, g, i] and index[b, g, i] <= N + r]
                scores = [score(query[b, h, r], keys[b, g, i]) for i in seen]
                rows = [values[b, g, i] for i in seen]
                plain[b, h, r] = torch.tensor(scores).softmax(0) @ torch.stack(rows)
                if gone.any():
                    mean = score(query[b, h, r], entries.key[b, g][gone].mean(0))
                    scores.append(mean + math.log(int(gone.sum())))
                    rows.append(entries.value[b, g][gone].mean(0))
                want[b, h, r] = torch.tensor(scores).softmax(0) @ torch.stack(rows)
    return plain, method.compensate(plain, call), want


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_compensation_token(share: float, softcap: float | None) -> None:
    plain, found, want = _after(replace(NOBODY, induction=share), softcap)
    assert close(found, want)
    assert not close(found[:, :2], plain[:, :2])
    assert torch.equal(found[:, 2:], plain[:, 2:]) is (share == 0.5)


def test_it_can_be_left_out() -> None:
    plain, found, _ = _after(replace(NOBODY, compensation=False))
    assert torch.equal(found, plain)


def test_what_is_dropped_later_joins_the_token() -> None:
    state = State()
    kept, entries = _read(NOBODY, state)
    index = torch.cat([kept[0, 0].nonzero().flatten(), torch.tensor([N])])[None, None]
    keys = torch.cat([entries.key[:, :, kept[0, 0]], _draw(2, 2, 1, D, seed=2)], 2)
    positions = Positions(index, index)
    call = _call(Positions.row(N, 1), positions, _draw(2, 4, 1, D), keys, state)
    NOBODY.drop(CachedKV(keys, keys[..., :DV], positions, 1), call)
    assert torch.equal(state.cache["count"], torch.full((2, 2, 1, 1), N - 4))
    assert close(state.cache["key"], _draw(2, 2, N, D)[:, :, 2 : N - 2].sum(2, keepdim=True))


@pytest.mark.parametrize("induction", [0.0, 0.5])
def test_a_cache_from_which_nothing_was_dropped_gets_no_token(induction: float) -> None:
    """One prefix, copied for each question; nothing goes before the question does."""
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    method = RazorAttention(budget=6, least=1, sinks=1, induction=induction, echo=0.0, seed=3)
    found = []
    for before in (0, 1):
        with torch.no_grad(), attach(model, method) as run:
            prefix = run(input_ids=ids[:, :6], use_cache=True)[CACHE]
            for _ in range(before):
                _pieces(run, ids[:, 6:].flip(1), [5, 8], past=copy.deepcopy(prefix))
            found.append(_pieces(run, ids[:, 6:], [4, 9], past=copy.deepcopy(prefix)))
    assert torch.equal(found[1], found[0])


def test_a_copy_of_a_cache_has_a_token_of_its_own() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    method = RazorAttention(budget=6, least=1, sinks=1, induction=0.5, echo=0.0, seed=3)
    with torch.no_grad(), attach(model, method) as run:
        prefix = run(input_ids=ids[:, :9], use_cache=True)[CACHE]
        first = _pieces(run, ids[:, 9:], [4], past=copy.deepcopy(prefix))
        assert torch.equal(_pieces(run, ids[:, 9:], [4], past=prefix), first)


def test_beams_that_change_places_take_their_token_along() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    method = RazorAttention(budget=6, least=1, sinks=1, induction=0.5, echo=0.0, seed=3)
    with torch.no_grad(), attach(model, method) as run:
        cache = run(input_ids=ids[:, :15], use_cache=True)[CACHE]
        want = _pieces(run, ids[:, 15:], [1, 2], past=copy.deepcopy(cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        found = _pieces(run, ids[:, 15:].flip(0), [1, 2], past=cache)
    assert close_model(found.flip(0), want)


def test_a_text_padded_on_the_right_goes_on_as_alone() -> None:
    """A text of 12 tokens in a row of 16: what follows sees its newest ones, its token, and nothing of the padding."""
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    mask, positions = torch.ones(2, 20, dtype=torch.long), torch.arange(20).expand(2, -1).clone()
    mask[1, 12:16] = 0
    positions[1, 16:] = torch.arange(12, 16)
    alone = torch.cat([ids[1:, :12], ids[1:, 16:]], 1)
    method = RazorAttention(budget=0.25, least=1, sinks=1, induction=0.5, echo=0.0, seed=3)
    with torch.no_grad(), attach(model, method) as run:
        past = run(input_ids=ids[:, :16], attention_mask=mask[:, :16], use_cache=True)[CACHE]
        counts = [notes_in(past)["count"].flatten(1).tolist()]
        inputs = dict(input_ids=ids[:, 16:], attention_mask=mask, position_ids=positions[:, 16:])
        both = run(**inputs, **{CACHE: past}).logits[1:]
        past = run(input_ids=alone[:, :12], use_cache=True)[CACHE]
        counts.append(notes_in(past)["count"].flatten(1).tolist())
        want = run(input_ids=alone[:, 12:], **{CACHE: past}).logits
    assert counts[0][1] == counts[1][0]
    assert set(counts[1][0]) == {0, 12 - 1 - 3}
    assert close_model(both, want)


def _pieces(
    run: object, ids: Tensor, bounds: list[int], mask: Tensor | None = None, past: object | None = None
) -> Tensor:
    """Logits of a text that is read in pieces."""
    logits = []
    for start, stop in pairwise([0, *bounds, ids.shape[1]]):
        seen = None if mask is None else mask[:, :stop]
        out = run(input_ids=ids[:, start:stop], attention_mask=seen, **{CACHE: past}, use_cache=True)
        past = out[CACHE]
        logits.append(out.logits)
    return torch.cat(logits, 1)


def _steps(run: object, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the last three tokens, read one by one after the rest."""
    n = ids.shape[1]
    return _pieces(run, ids, [n - 3, n - 2, n - 1], mask)[:, -3:]


def test_a_piece_that_is_padding_is_no_harm() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    method = RazorAttention(budget=3, least=1, sinks=0, induction=0.5, echo=0.0, seed=3)
    with torch.no_grad(), attach(model, method) as run:
        both = _pieces(run, ids, [3, 9, 14], mask)
        alone = _pieces(run, ids[:1, 7:], [2, 7])
    assert both.isfinite().all()
    assert close_model(both[:1, 7:], alone)


def test_left_padding_and_new_texts_change_nothing() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    method = RazorAttention(budget=4, least=1, sinks=1, induction=0.5, echo=0.0, seed=3)
    with torch.no_grad(), attach(model, method) as run:
        alone = _steps(run, ids[:1, 5:])
        both = _steps(run, ids, mask)
        again = _steps(run, ids[:1, 5:])
        cache = run(input_ids=ids[:, :12], attention_mask=mask[:, :12], use_cache=True)[CACHE]
    assert torch.equal(again, alone)
    assert close_model(both[:1], alone)
    assert cache.layers[0].counts == [5, 7, 5, 12], "no padding is held"


def test_heads_that_were_spared_have_nothing_to_make_up() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    method = RazorAttention(budget=4, least=1, sinks=1, induction=0.0, echo=0.0, seed=3)
    scores = Fitted({f"{kind}.{i}": torch.tensor([0.0, 1.0]) for kind in ("induction", "echo") for i in (0, 1)})
    with torch.no_grad(), attach(model, method.on(heads=[0, 1])) as run:
        some = _steps(run, ids)
    with torch.no_grad(), attach(model, replace(method, induction=0.5, scores=scores)) as run:
        want = _steps(run, ids)
    assert close_model(some, want)


def test_another_method_that_drops_entries_is_refused() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    method = RazorAttention(budget=6, least=1, sinks=1, induction=0.0, echo=0.0, seed=0)
    with pytest.raises(SiteError, match="drops"), torch.no_grad(), attach(model, method | SinkWindow(1, 3)) as run:
        _steps(run, ids)


def test_a_fit_scores_copies() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    ids = models.tiny_inputs(model, length=7)["input_ids"].repeat(1, 4)
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    found = fit(RazorAttention(), model, [{"input_ids": ids}]).scores
    for layer, pattern in enumerate(maps):
        for kind, ahead in (("echo", 0), ("induction", 1)):
            total = torch.zeros(4)
            for i in range(28):
                for j in range(i - 7, -1, -7):
                    if j + ahead > 0:  # the first token does not count
                        total += pattern[:, :, i, j + ahead].sum(0)
            assert found is not None
            assert close_model(found[f"{kind}.{layer}"], total.view(2, 2).amax(1))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 2.0}, r"RazorAttention\.budget"),
        ({"least": 0}, r"RazorAttention\.least = 0"),
        ({"sinks": -1}, r"RazorAttention\.sinks"),
        ({"echo": 1.5}, r"RazorAttention\.echo"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        RazorAttention(**settings)


def test_a_fit_needs_texts_that_come_again() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    with pytest.raises(FieldError, match="come again"):
        fit(RazorAttention(), model, [{"input_ids": ids}])
    with pytest.raises(FieldError, match=r"heedful\.fit\(\)"), attach(model, RazorAttention()) as run:
        run(input_ids=ids, use_cache=True)


def test_what_is_missing_is_counted_by_each_texts_own_position() -> None:
    call = replace(Bare().call, mask=Mask(), queries=Positions.row(5, 2, pad=torch.tensor([0, 2])))
    assert RazorAttention._missing(Positions.row(0, 3), call).tolist() == [[[[4]]], [[[2]]]]


def test_a_short_text_is_left_whole_and_told_so() -> None:
    told = "there is room for {0} tokens, and the text has {0}: a smaller least, with budget=0.2, would act"
    for budget, least, most in ((3, 5, 7), (6, 5, 8)):
        method = RazorAttention(budget, least, sinks=2, seed=0)
        assert method.rests(most) == told.format(most)
        assert method.rests(most + 1) is None
