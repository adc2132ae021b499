"""AVL against a Llama that is written out: what is dropped, which core each step sees, and when it is chosen anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.methods import AVL

SPANS = ((2, 9), (10, 13))
IMAGE = [j for start, stop in SPANS for j in range(start, stop)]


def top(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda j: (-scores[j], j))[:count])


class ByHand:
    """One text, token by token: what each key head of each layer holds, and which of the image it looks at."""

    def __init__(self, model: Any, kept: float, core: float, every: int, image: list[int]) -> None:
        self.model, self.kept, self.core, self.every, self.image = model, kept, core, every, image
        self.past: list[Any] = [None] * len(model.model.layers)
        self.held: dict[tuple[int, int], set[int]] = {}
        self.cores: dict[tuple[int, int], set[int]] = {}
        self.seen, self.steps = 0, 0

    def feed(self, tokens: Tensor) -> Tensor:
        inner, n = self.model.model, len(tokens)
        places = torch.arange(self.seen, self.seen + n)
        x = inner.embed_tokens(tokens[None])
        for number, layer in enumerate(inner.layers):
            x = x + self.attend(number, layer, layer.input_layernorm(x), places, inner.rotary_emb(x, places[None]))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.steps += self.seen > 0
        self.seen += n
        return self.model.lm_head(inner.norm(x))[0, -1]

    def attend(self, number: int, layer: Any, x: Tensor, places: Tensor, turns: Any) -> Tensor:
        n, attention, d = len(places), layer.self_attn, layer.self_attn.head_dim
        q, k, v = (
            project(x).view(1, n, -1, d).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *turns)
        if self.past[number] is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.past[number], (k, v), strict=True))
        self.past[number] = k, v
        size, out = q.shape[1] // k.shape[1], []
        for group in range(k.shape[1]):
            mine = number, group
            given = dict.fromkeys(self.image, 0.0)
            fresh = self.seen > 0 and self.steps % self.every == 0
            for head in range(group * size, (group + 1) * size):
                rows = []
                for i in range(n):
                    sees = [j for j in range(int(places[i]) + 1) if self.sees(mine, j, fresh)]
                    scores = [float(q[0, head, i] @ k[0, group, j]) / math.sqrt(d) for j in sees]
                    weights = torch.tensor(scores).softmax(0)
                    rows.append(weights @ v[0, group, sees])
                    if i == n - 1:
                        for j, weight in zip(sees, weights.tolist(), strict=True):
                            if j in given:
                                given[j] += weight
                out.append(torch.stack(rows))
            if self.seen == 0:
                left = top(given, math.ceil(self.kept * len(self.image)))
                self.held[mine] = {j for j in range(1000) if j not in self.image or j in left}
            elif fresh:
                self.cores[mine] = top(given, math.ceil(self.core * len(self.image)))
        return attention.o_proj(torch.cat(out, -1))[None]

    def sees(self, mine: tuple[int, int], j: int, fresh: bool) -> bool:
        if self.seen == 0:
            return True
        return j in self.held[mine] and (fresh or j not in self.image or j in self.cores[mine])


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", num_hidden_layers=2, attn_implementation="eager")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this run changed nothing")
@pytest.mark.parametrize(
    ("kept", "core", "every"), [(0.5, 0.2, 3), (1.0, 0.11, 2), (0.3, 1.0, 1), (0.25, 0.3, 4), (0.81, 0.1, 9)]
)
@pytest.mark.parametrize("pad", [0, 3])
def test_a_core_is_seen_and_chosen_anew(model: Any, kept: float, core: float, every: int, pad: int) -> None:
    by = torch.Generator().manual_seed(0)
    prompt, more = torch.randint(3, 127, (2, 15), generator=by), torch.randint(3, 127, (2, 5), generator=by)
    padded = torch.cat([torch.zeros(2, pad, dtype=torch.long), prompt], 1)
    text = (torch.arange(pad + 20) >= pad).long().expand(2, -1)
    hands = [ByHand(model, kept, core, every, IMAGE) for _ in range(2)]
    for hand, row in zip(hands, prompt, strict=True):
        hand.feed(row)
    with heedful.attach(model, AVL(kept, core, every), roles={"image": SPANS}) as run:
        cache = cache_of(run(input_ids=padded, attention_mask=text[:, : pad + 15], use_cache=True))
        for step in range(5):
            seen = text[:, : pad + 16 + step]
            found = run(input_ids=more[:, step : step + 1], attention_mask=seen, **{CACHE: cache}).logits[:, -1]
            for hand, row, token in zip(hands, found, more[:, step], strict=True):
                assert close_model(row, hand.feed(token[None])), step


@torch.no_grad()
def test_texts_have_images_of_their_own(model: Any) -> None:
    by = torch.Generator().manual_seed(1)
    prompt, more = torch.randint(3, 127, (2, 15), generator=by), torch.randint(3, 127, (2, 3), generator=by)
    images = [((1, 5),), ((3, 13),)]
    hands = [ByHand(model, 0.5, 0.1, 2, list(range(*spans[0]))) for spans in images]
    hands[0].core = 0.25  # a share of the larger image, of which the first holds four
    for hand, row in zip(hands, prompt, strict=True):
        hand.feed(row)
    with heedful.attach(model, AVL(0.5, 0.1, 2), roles=[{"image": spans} for spans in images]) as run:
        cache = cache_of(run(input_ids=prompt, use_cache=True))
        for step in range(3):
            found = run(input_ids=more[:, step : step + 1], **{CACHE: cache}).logits[:, -1]
            for hand, row, token in zip(hands, found, more[:, step], strict=True):
                assert close_model(row, hand.feed(token[None])), step


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this run changed nothing")
def test_the_rest_is_dropped_for_good(model: Any) -> None:
    ids = torch.randint(3, 127, (1, 15), generator=torch.Generator().manual_seed(0))
    with heedful.attach(model, AVL(share=0.3, core=0.1), roles={"image": SPANS}) as run:
        cache = run(input_ids=ids, use_cache=True)[CACHE]
        assert [list(layer.counts) for layer in cache.layers] == [[5 + 3] * 2] * 2


def test_defaults_and_wrong_fields(model: Any) -> None:
    assert (AVL().share, AVL().core, AVL().every, AVL(every=1).every) == (0.5, 0.3, 3, 1)
    for name, wrong in (("share", 0.0), ("share", 1.1), ("core", 0.0), ("core", 1.1), ("every", 0)):
        with pytest.raises(FieldError, match=rf"AVL\.{name} = "):
            AVL(**{name: wrong})
    idle = pytest.warns(InactiveWarning, match="which was idle")
    ids = torch.arange(3, 12)[None]
    with idle, torch.no_grad(), heedful.attach(model, AVL(1.0, 1.0), roles={"image": SPANS}) as run:
        assert torch.equal(run(input_ids=ids).logits, model(input_ids=ids).logits)
