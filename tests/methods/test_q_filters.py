"""Q-Filters: keys far along the queries' principal direction stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.methods.sparse.cache.q_filters import QFilters

N, D = 12, 6


def _entries(seed: int = 0, pad: Tensor | None = None) -> tuple[CachedKV, Call]:
    draw = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 2, 2, N, D, generator=draw)
    positions = Positions.row(0, N, pad=pad)
    call = Call(0, 1, "layer", 4, 2, positions, positions, D**-0.5, mask=Mask())
    return CachedKV(key, value, positions, N), call


def _filters(seed: int = 1) -> Tensor:
    return torch.randn(2, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("budget", "window"), [(5, 2), (5, 0), (0.5, 3), (3, 3), (2, 8)])
def test_the_newest_and_the_farthest_along_stay(budget: float, window: int) -> None:
    entries, call = _entries()
    filters = _filters()
    found = QFilters(budget, window, Fitted({"filters.0": filters})).filter(entries, call)
    room = budget if isinstance(budget, int) else int(budget * N)
    newest = min(window, room)
    for b in range(2):
        for g in range(2):
            far = [float(entries.key[b, g, i] @ filters[g]) for i in range(N - newest)]
            best = sorted(range(len(far)), key=lambda i: -far[i])[: room - newest]
            want = {*best, *range(N - newest, N)}
            assert set(found[b, g].nonzero().flatten().tolist()) == want


def test_padding_holds_no_room() -> None:
    entries, call = _entries(pad=torch.tensor([0, 4]))
    is_filled = torch.ones(2, 1, N, dtype=torch.bool)
    is_filled[1, :, :4] = False
    entries = replace(entries, positions=replace(entries.positions, is_filled=is_filled))
    kept = QFilters(0.5, 2, Fitted({"filters.0": _filters()})).filter(entries, call)
    assert kept.sum(-1).tolist() == [[6, 6], [4, 4]]
    assert not kept[1, :, :4].any()


class Spy(Method):
    """Keeps the queries of each layer."""

    paper = QFilters.paper

    @reads(Site.QUERY)
    def keep(self, query: Tensor, call: Call) -> Cat:
        return Cat.of("queries", query)


def _by_singular_vectors(queries: Tensor, kv_heads: int) -> Tensor:
    """As the authors' code reads, over all queries `[h n d]` and with the paper's sign."""
    out = []
    for q in queries:
        main = torch.linalg.svd(q.double()).Vh[0]
        out.append(main if float((q.double() @ main).mean()) > 0 else -main)
    return torch.stack(out).unflatten(0, (kv_heads, -1)).mean(1).float()


def test_a_fit_finds_the_singular_vectors_of_text() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), attach(model, Spy()) as run:
        run(input_ids=ids, attention_mask=mask)
        seen = [stat.value[0] for stat in run[Spy()].values()]
    fitted = fit(QFilters(), model, [{"input_ids": ids, "attention_mask": mask}])
    assert fitted.filters is not None
    for layer, query in enumerate(seen):
        text = torch.cat([query[0, :, 7:], query[1]], 1)
        assert close_model(fitted.filters[f"filters.{layer}"], _by_singular_vectors(text, 2))


def test_it_cuts_the_cache_of_a_model_at_every_step() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    method = fit(QFilters(8, 4), model, [{"input_ids": ids}])
    with torch.no_grad(), attach(model, method) as run:
        out = run(input_ids=ids, use_cache=True)
        for _ in range(3):
            out = run(input_ids=ids[:, :1], **{CACHE: out[CACHE]}, use_cache=True)
            assert {layer.keys.shape[2] for layer in out[CACHE].layers} == {8}


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"budget": 0}, r"QFilters\.budget"), ({"budget": 1.5}, r"QFilters\.budget"), ({"window": -1}, "window = -1")],
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        QFilters(**settings)


def test_without_a_fit_it_says_so_and_a_fit_to_another_model_is_refused() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with pytest.raises(FieldError, match=r"heedful\.fit\(\)"), attach(model, QFilters()) as run:
        run(input_ids=ids, use_cache=True)
    other = fit(QFilters(4, 2), models.tiny("mha"), [{"input_ids": ids}])
    with pytest.raises(FieldError, match="another model"), attach(model, other) as run:
        run(input_ids=ids, use_cache=True)


def test_no_more_than_the_text_is_declared() -> None:
    assert QFilters(budget=70).declares(5) == {"kept": 5}
    assert QFilters(budget=70).declares(90) == {"kept": 70}
