"""What the tests of linear attention share: calls, padded or not, held against weights or sums in loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.mask import Causal, Mask, Padding
from heedful.core.method import Method
from heedful.core.state import State

N = 19
PADDED = torch.ones(2, N, dtype=torch.bool)
PADDED[0, :6] = False
PADDED[1, 15:] = False


@dataclass(frozen=True)
class Text:
    """One head of one text without its padding: what is read by hand."""

    q: Tensor  # [n d]
    k: Tensor  # [n d]
    v: Tensor  # [n dv]
    scale: float
    causal: bool
    head: int

    def seen(self, i: int) -> int:
        """How many of the first keys token i sees."""
        return i + 1 if self.causal else len(self.k)


ByHand = Callable[[Text], Tensor]  # a text to its heads' output [n dv]


def drawn(causal: bool, padded: bool, shape: Shape | None = None, lower: float = 0.0) -> tuple[Bare, Call]:
    """Tensors and a call, with a state of its own; queries and keys are that much `lower`."""
    bare = Bare(shape or Shape(dv=6), dtype=torch.float64, text=PADDED if padded else None)
    bare.q, bare.k = bare.q - lower, bare.k - lower
    rules = ((Causal(),) if causal else ()) + ((Padding(PADDED),) if padded else ())
    return bare, replace(bare.call, mask=Mask(rules), state=State(), roles={})


def read(bare: Bare, call: Call, by_hand: ByHand) -> tuple[Tensor, Tensor]:
    """The output by hand `[b h n dv]`, and which tokens are text `[b 1 n 1]`."""
    s = bare.shape
    text = torch.ones(s.b, s.q, dtype=torch.bool) if bare.text is None else bare.text
    rows = []
    for b in range(s.b):
        keep = text[b].nonzero().flatten()
        keys = keep if s.k == s.q else torch.arange(s.k)
        heads = []
        for h in range(s.h):
            g = h * s.g // s.h
            one = Text(bare.q[b, h, keep], bare.k[b, g, keys], bare.v[b, g, keys], call.scale, call.mask.causal, h)
            heads.append(torch.zeros(s.q, s.dv, dtype=torch.float64).index_copy(0, keep, by_hand(one)))
        rows.append(torch.stack(heads))
    return torch.stack(rows), text[:, None, :, None]


def agrees(
    method: Method,
    by_hand: ByHand,
    causal: bool,
    padded: bool,
    shape: Shape | None = None,
    lower: float = 0.0,
    params: dict[str, Tensor] | None = None,
    unused: tuple[str, ...] = (),
) -> None:
    """Forward in both precisions, and the gradients of what the text tokens get, but for what is `unused` of q, k, v.

    What is read by hand may use `params` too, which have gradients then.
    """
    bare, call = drawn(causal, padded, shape, lower)
    call = replace(call, params=params or {})
    qkv = {"q": bare.q, "k": bare.k, "v": bare.v}
    given = [*(x for name, x in qkv.items() if name not in unused), *(params or {}).values()]
    for x in (*qkv.values(), *given):
        x.requires_grad_(True)
    wanted, text = read(bare, call, by_hand)
    found = method.attend(tuple(qkv.values()), call) * text  # type: ignore[attr-defined]
    assert close(found, wanted)
    weight = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    asked = [torch.autograd.grad((x * weight).sum(), given) for x in (found, wanted)]
    for slope, want in zip(*asked, strict=True):
        assert bool(want.any())
        assert close(slope, want, 2048)
    single = [x.detach().float() for x in qkv.values()]
    found = method.attend(tuple(single), replace(call, state=State())) * text  # type: ignore[attr-defined]
    assert close(found, wanted.float(), 512)


def refuses_a_cache_that_was_cut_back(method: Method) -> None:
    """As of sums over queries, of which no cache holds those that are gone."""
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with torch.no_grad(), attach(model, method) as run:
        cache = run(input_ids=ids, use_cache=True)[CACHE]
        cache.crop(-4)
        with pytest.raises(SiteError, match="sums over earlier queries are needed"):
            run(input_ids=ids[:, 8:], **{CACHE: cache})
