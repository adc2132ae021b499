"""Loki: keys are ranked along the first principal axes, and the best are attended to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.kit.budget import room_for
from heedful.methods.sparse.decode.loki import Loki, _Keys

N, D = 19, 8
AXES = torch.linalg.qr(torch.randn(2, D, D, generator=torch.Generator().manual_seed(5))).Q


@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
@pytest.mark.parametrize("queries", [N, 6, 1])
@pytest.mark.parametrize(
    ("budget", "rank", "r"), [(3, 0.25, 2), (0.3, 0.5, 4), (6, 1.0, 8), (2, 0.1, 1), (30, 0.5, 4), (1, 0.5, 4)]
)
def test_the_formula(budget: float, rank: float, r: int, queries: int, pads: list[int]) -> None:
    text = torch.arange(N) >= torch.tensor(pads)[:, None]
    bare = Bare(Shape(q=queries), text=text)
    call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    mask = Loki(budget, rank, Fitted({"axes.0": AXES})).rank_keys(call.mask, call)
    for rows in (slice(0, queries), slice(queries // 2, queries)):
        kept = mask.keeps(call.tile(rows, slice(0, N)).pairs)
        for b, pad in enumerate(pads):
            for h in range(4):
                low = AXES[h // 2][:, :r]
                for i in range(rows.start, rows.stop):
                    last = N - queries + i
                    if last < pad:
                        continue
                    scores = (bare.k[b, h // 2, pad : last + 1] @ low) @ (bare.q[b, h, i] @ low)
                    best = scores.argsort(descending=True)[: room_for(budget, last + 1 - pad)] + pad
                    assert set(kept[b, h, i - rows.start].nonzero().flatten().tolist()) == set(best.tolist())


def test_what_other_rules_hide_takes_nobodys_place() -> None:
    from heedful.core.mask import Window

    bare = Bare()
    call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    kept = Loki(3, 0.5, Fitted({"axes.0": AXES})).rank_keys(call.mask & Window(5), call)
    counts = kept.keeps(call.tile(slice(0, N), slice(0, N)).pairs).sum(-1)
    assert (counts[..., 2:] == 3).all()


class Spy(Method):
    """Keeps the keys of each layer."""

    paper = Loki.paper

    @reads(Site.KEY)
    def keep(self, key: Tensor, call: Call) -> Cat:
        return Cat.of("keys", key)


def test_a_fit_finds_the_principal_axes_of_text() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=30)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), attach(model, Spy()) as run:
        run(input_ids=ids, attention_mask=mask)
        seen = [stat.value[0].double() for stat in run[Spy()].values()]
    fitted = fit(Loki(), model, [{"input_ids": ids, "attention_mask": mask}])
    assert fitted.axes is not None
    for layer, keys in enumerate(seen):
        text = torch.cat([keys[0, :, 7:], keys[1]], 1)
        want = torch.linalg.svd(text - text.mean(1, keepdim=True), full_matrices=False).Vh.mT.float()
        found = fitted.axes[f"axes.{layer}"]
        assert close_model((found * want).sum(1).abs(), torch.ones(2, 8))  # each axis but for its sign


def test_all_axes_rank_as_the_scores_do() -> None:
    bare = Bare()
    call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    exact = Loki(4, 1.0, Fitted({"axes.0": torch.eye(D).expand(2, D, D)})).rank_keys(call.mask, call)
    drawn = Loki(4, 1.0, seed=0).rank_keys(call.mask, call)
    part = call.tile(slice(0, N), slice(0, N))
    assert torch.equal(exact.keeps(part.pairs), drawn.keeps(part.pairs))


def test_the_mask_holds_no_tensors_of_the_call() -> None:
    bare = Bare()
    call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    mask = Loki(4, 0.5, seed=0).rank_keys(call.mask, call)
    held = [cell.cell_contents for cell in mask.rules[-1].pick.__closure__]
    (kept,) = [x for x in held if isinstance(x, Call)]
    assert all(getattr(kept, name) is None for name in ("query", "key", "value", "hidden", "rotate"))
    assert not any(x is bare.k or x is bare.q for x in held)


@pytest.mark.parametrize(
    ("settings", "match"), [({"budget": 0.0}, r"Loki\.budget"), ({"rank": 0.0}, r"Loki\.rank"), ({"rank": 2}, "rank")]
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        Loki(**settings)


def test_without_a_fit_it_says_so() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with pytest.raises(FieldError, match=r"heedful\.fit\(\)"), attach(model, Loki()) as run:
        run(input_ids=ids)
    other = fit(Loki(), models.tiny("mha"), [{"input_ids": ids}])
    with pytest.raises(FieldError, match="another model"), attach(model, other) as run:
        run(input_ids=ids)


@pytest.mark.parametrize(("budget", "most"), [(3, lambda n: 3), (0.3, lambda n: -(-3 * n // 10))])
def test_what_it_declares(budget: float, most: Callable[[int], int]) -> None:
    for tokens in (1, 2, 10):
        pairs = sum(min(n, most(n)) for n in range(1, tokens + 1))
        assert Loki(budget).declares(tokens) == {"density": pairs / tokens**2}


def test_a_fit_reads_the_text_of_another_sequence_too() -> None:
    key = torch.randn(2, 1, 5, 2, generator=torch.Generator().manual_seed(0))
    call = replace(
        Bare().call, queries=Positions.row(0, 3), keys=Positions.row(0, 5, pad=torch.tensor([0, 2])), cross=True
    )
    text = [key[0, 0, i] for i in range(5)] + [key[1, 0, i] for i in range(2, 5)]
    found = _Keys().read(key, call).value
    wanted = sum(torch.outer(x, x) for x in (torch.cat([x.double(), torch.ones(1)]) for x in text))
    assert close(found[0], wanted)


def test_it_is_idle_where_every_key_is_among_the_best() -> None:
    call = Bare().call
    assert [Loki(budget, seed=0).idle(call) for budget in (1.0, 0.5, 1)] == [True, False, False]  # one entry


def test_a_short_text_is_left_whole_and_told_so() -> None:
    assert Loki(5).rests(5) == "there is room for 5 tokens, and the text has 5: budget=0.5 would act"
    assert Loki(5).rests(6) is None
