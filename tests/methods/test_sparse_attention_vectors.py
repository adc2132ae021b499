"""SparseAttentionVectors against the authors' steps in loops, over outputs that plain hooks caught."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from heedful import attach, fit, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import SparseAttentionVectors
from heedful.methods.observe.sparse_attention_vectors import Votes

LABELS = torch.tensor([1, 0, 2, 1, 0, 2, 2, 1])


def caught(model: Any, projections: list[Any], place: int, **inputs: Tensor) -> Tensor:
    """What each head hands over at a place, `[texts layers*heads d]`, four heads a layer."""
    seen: list[Tensor] = []
    handles = [p.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, place])) for p in projections]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.cat([x.unflatten(-1, (4, -1)) for x in seen], 1)


def by_hand(shown: Tensor, asked: Tensor, count: int) -> tuple[list[int], list[int]]:
    """The authors' fit and vote: heads by how many examples they name, and the class that most of them name."""
    means = torch.stack([shown[c == LABELS].mean(0) for c in range(3)])

    def nearest(x: Tensor, head: int) -> int:
        return int(torch.stack([cosine_similarity(x[head], means[c, head], dim=-1) for c in range(3)]).argmax())

    right = [sum(nearest(x, head) == c for x, c in zip(shown, LABELS.tolist(), strict=True)) for head in range(8)]
    best = sorted(range(8), key=lambda head: -right[head])[:count]
    return best, [Counter(nearest(x, head) for head in best).most_common()[0][0] for x in asked]


@pytest.mark.parametrize("count", [1, 3, 4, 8])
def test_heads_and_votes_are_those_of_the_authors(count: int) -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=8, length=9, seed=4)["input_ids"]
    asked = models.tiny_inputs(model, batch=6, length=7, seed=5)["input_ids"]
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    best, classes = by_hand(
        caught(model, projections, -1, input_ids=ids), caught(model, projections, -1, input_ids=asked), count
    )
    batches = [{"input_ids": ids[:3], "label": LABELS[:3].tolist()}, {"input_ids": ids[3:], "label": LABELS[3:]}]
    method = fit(SparseAttentionVectors(count), model, batches)
    assert method.heads == tuple(divmod(head, 4) for head in best)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), asked[3:]], 1)
    with torch.no_grad(), attach(model, method) as run:
        run(input_ids=asked[:3])
        run(input_ids=padded, attention_mask=(torch.arange(9) > 1).long().expand(3, -1))
        found = run[method]
    assert found.classes.tolist() == classes
    assert found.heads == method.heads
    assert found.each.shape == (6, count)
    assert str(found) == f"{count} heads vote for the classes {classes}"


def test_centroids_are_means_of_the_heads_that_vote() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=8, length=9, seed=4)["input_ids"]
    shown = caught(model, [layer.self_attn.o_proj for layer in model.model.layers], -1, input_ids=ids)
    method = fit(SparseAttentionVectors(5), model, [{"input_ids": ids, "label": LABELS}])
    assert method.centroids is not None
    for layer in (0, 1):
        heads = [head for at, head in method.heads if at == layer]
        means = torch.stack([shown[c == LABELS][:, [4 * layer + h for h in heads]].mean(0) for c in range(3)])
        assert close_model(method.centroids[f"c.{layer}"], means)


def test_an_image_is_read_at_its_class_token() -> None:
    model = models.tiny("vit")
    pixels = models.tiny_inputs(model, batch=8, seed=1)["pixel_values"]
    projections = [m for name, m in model.named_modules() if name.endswith(("attention.output.dense", "o_proj"))]
    shown = caught(model, projections, 0, pixel_values=pixels)
    best, classes = by_hand(shown, shown, 4)
    method = fit(SparseAttentionVectors(4), model, [{"pixel_values": pixels, "label": LABELS}])
    assert method.heads == tuple(divmod(head, 4) for head in best)
    with torch.no_grad(), attach(model, method) as run:
        run(pixel_values=pixels)
        assert run[method].classes.tolist() == classes


def test_of_equally_many_votes_the_better_head_decides() -> None:
    votes = Votes(
        ((0, 0), (1, 0), (1, 1), (0, 1)), torch.tensor([[2, 1, 1, 2], [0, 1, 1, 2], [1, 2, 2, 1], [0, 1, 2, 2]])
    )
    assert votes.classes.tolist() == [2, 1, 1, 2]


def test_nothing_is_voted_for_while_a_text_is_written() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model, batch=1)
    with torch.no_grad(), attach(model, SparseAttentionVectors(seed=3)) as run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        found = run[SparseAttentionVectors(seed=3)]
    assert found.each.shape == (1, 8)
    assert found.heads == tuple(divmod(head, 4) for head in range(8))


def test_random_centroids_are_the_seeds_own() -> None:
    for seed, layer in ((3, 2), (0, 1)):
        wanted = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(4099 * seed + layer))
        assert torch.equal(SparseAttentionVectors(seed=seed)._centroids(layer, 4, 6), wanted)
    assert SparseAttentionVectors.example() == SparseAttentionVectors(seed=0)
    assert SparseAttentionVectors().count == 20


def test_errors() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=2)["input_ids"]
    with pytest.raises(FieldError, match=r"count = 0: must be 1 or more"):
        SparseAttentionVectors(0)
    with pytest.raises(FieldError, match="a pair of layer and head"):
        SparseAttentionVectors(heads=((0, -1),))
    with pytest.raises(FieldError, match="must be fitted"), attach(model, SparseAttentionVectors()) as run:
        run(input_ids=ids)
    with pytest.raises(FieldError, match=r'must have "label" \[b\]'):
        fit(SparseAttentionVectors(), model, [{"input_ids": ids}])
    for labels in ([0, 0], [0, 2], [1, 1]):
        with pytest.raises(FieldError, match="two classes or more, counted from 0 without a gap"):
            fit(SparseAttentionVectors(), model, [{"input_ids": ids, "label": labels}])
    with pytest.raises(FieldError, match="two classes or more"):
        fit(SparseAttentionVectors(), model, [])
    fitted = fit(SparseAttentionVectors(3), model, [{"input_ids": ids, "label": [0, 1]}])
    wide = models.tiny("llama", head_dim=16)
    with pytest.raises(FieldError, match="were fitted to another model"), attach(wide, fitted) as run:
        run(input_ids=ids)
    with (
        pytest.raises(FieldError, match="fitted to another model"),
        attach(models.tiny(num_hidden_layers=1), SparseAttentionVectors(heads=((1, 0),))) as run,
    ):
        run(input_ids=ids)
