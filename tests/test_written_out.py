"""Models that write attention out: a product, a softmax, a product. Whatever they do in between, they are served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, MegatronBertConfig, MegatronBertModel

import heedful
from heedful.adapters.cache_name import CACHE
from heedful.adapters.operations.written import Trail
from heedful.conformance.tolerances import close
from heedful.core.errors import NotEntered, RefusedModel, SiteError
from heedful.core.sites import Site
from tests.test_diagnose_texts import characters

pytestmark = pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")
B, N, H, D = 2, 7, 4, 8
LOW = torch.finfo(torch.float32).min
Writes = Callable[["Attention", Tensor, Tensor, Tensor], Any]


class Attention(nn.Module):
    """Self-attention whose middle is written in one of many ways."""

    def __init__(self, writes: Writes, weights: bool = False) -> None:
        super().__init__()
        self.writes, self.weights, self.num_heads = writes, weights, H
        self.q, self.k, self.v, self.out = (nn.Linear(H * D, H * D) for _ in "qkvo")
        self.table = nn.Parameter(torch.randn(H, N, N))
        self.dropout, self.mix = nn.Dropout(0.2), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (f(x).view(*x.shape[:2], H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        heads, weights = self.writes(self, q, k, v)
        y = self.out(heads.transpose(1, 2).reshape(x.shape))
        return (y, weights) if self.weights else y


class Net(nn.Module):
    def __init__(self, writes: Writes, weights: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(writes, weights) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        last = None
        for layer in self.layers:
            out = layer(x)
            y, last = out if isinstance(out, tuple) else (out, None)
            x = x + y
        return x if last is None else (x, last)


def plain(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = net.dropout((q @ k.transpose(-1, -2) / D**0.5).softmax(-1))
    return weights @ v, weights


def masked(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Causal, with a learned table and the first two tokens of the first text for padding."""
    scores = torch.matmul(q, k.transpose(2, 3)) * D**-0.5 + net.table
    later = torch.ones(N, N, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, LOW)
    gone = torch.zeros(B, 1, 1, N).index_fill(3, torch.tensor([0, 1]), LOW) * torch.tensor([1.0, 0.0]).view(B, 1, 1, 1)
    weights = net.dropout(F.softmax((scores + gone).clamp(min=LOW).float(), dim=-1).to(q.dtype))
    return torch.matmul(weights, v), weights


def in_rows(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Heads among the rows, the scale and a bias in one call."""
    rows = [x.reshape(B * H, N, D) for x in (q, k, v)]
    bias = net.table.repeat(B, 1, 1)
    scores = bias.baddbmm(batch1=rows[0], batch2=rows[1].transpose(1, 2), beta=0.5, alpha=D**-0.5)
    weights = net.dropout(scores.view(B, H, N, N).softmax(dim=-1))
    return torch.bmm(weights.view(B * H, N, N), rows[2]).view(B, H, N, D), weights


def by_letters(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Tokens first, as in Transformer-XL."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    content = torch.einsum("ibnd,jbnd->bnij", q, k)
    scores = (content + net.table) * D**-0.5
    weights = net.dropout(nn.Softmax(dim=3)(scores))
    return torch.einsum("bnij,jbnd->ibnd", weights, v).permute(1, 2, 0, 3), weights


def one_for_each_head(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Cosines times a learned number for each head, as in Swin v2; scores are changed in place."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * net.table[:, :1, :1].exp()
    scores += net.table
    weights = net.dropout(torch.softmax(scores, dim=-1))
    return weights @ v, weights


def ones_and_zeros(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A mask that is multiplied, as in the first GPT."""
    seen = torch.ones(N, N).tril()
    scores = (q @ k.transpose(-1, -2)) / torch.tensor(D**0.5) * seen + -1e4 * (1 - seen)
    weights = net.dropout(scores.softmax(-1))
    return weights @ v, weights


def endless(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Later tokens at minus infinity."""
    later = torch.where(torch.ones(N, N).tril() > 0, 0.0, float("-inf"))
    weights = net.dropout((q @ k.transpose(-1, -2) / D**0.5 + later).softmax(-1))
    return weights @ v, weights


def emptied(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The first text's first two tokens see nothing, which would be no number, and are given zeros."""
    seen = torch.ones(B, 1, N, N, dtype=torch.bool).tril()
    seen[0, :, :2] = seen[0, ..., :2] = False
    scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    weights = net.dropout(scores.softmax(-1).masked_fill(~seen, 0.0))
    return weights @ v, weights


WAYS = [plain, masked, endless, emptied, in_rows, by_letters, one_for_each_head, ones_and_zeros]
HALVE = heedful.edit(Site.PATTERN, lambda pattern, call: pattern * 0.5)
SAME = heedful.edit(Site.SCORES, lambda scores, call: scores.clone())
TWICE = heedful.edit(Site.QUERY, lambda q, call: 2 * q)


def text(y: Tensor) -> Tensor:
    """Without the first text's padding, in which queries see nothing, where modules give a mean of everything."""
    return torch.cat([y[0, ..., 2:, :].flatten(0, -2), y[1].flatten(0, -2)])


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(B, N, H * D)


def halved(writes: Writes) -> Writes:
    """The same way with half of each weight, by its own hand."""

    def also(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        heads, weights = writes(net, q, k, v)
        return heads * 0.5, weights * 0.5

    return also


@pytest.mark.parametrize("writes", WAYS)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_what_changes_nothing_gives_the_same(writes: Writes, backend: str, x: Tensor) -> None:
    net = Net(writes).eval()
    want = net(x)
    with heedful.attach(net, SAME, backend=backend) as run:
        assert close(text(run(x)), text(want))
        assert run.layer_names == ("layers.0", "layers.1")
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("writes", WAYS)
def test_an_edit_acts_on_the_weights_and_is_given_with_them(writes: Writes, x: Tensor) -> None:
    net, other = Net(writes, weights=True).eval(), Net(halved(writes), weights=True).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, HALVE) as run:
        assert all(close(text(a), text(b)) for a, b in zip(run(x), other(x), strict=True))


@pytest.mark.parametrize("writes", [w for w in WAYS if w is not one_for_each_head])
def test_queries_are_those_of_the_product(writes: Writes, x: Tensor) -> None:
    def louder(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return writes(net, 2 * q, k, v)

    net, other = Net(writes).eval(), Net(louder).eval()
    other.load_state_dict(net.state_dict())
    with heedful.attach(net, TWICE) as run:
        assert close(text(run(x)), text(other(x)))


@pytest.mark.parametrize("writes", WAYS)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_gradients_are_those_of_the_module(writes: Writes, again: bool, x: Tensor) -> None:
    net = Net(writes)
    for layer in net.layers:
        layer.dropout.p = 0.0

    def gradients() -> list[Tensor]:
        net.zero_grad()
        out = checkpoint(net, x, use_reentrant=False) if again else net(x)
        text(out).square().sum().backward()
        named = net.named_parameters()
        return [p.grad.clone() for name, p in named if p.grad is not None and "k.bias" not in name]  # those are zero

    want = gradients()
    with heedful.attach(net, SAME, inputs=x):
        assert all(close(a, b) for a, b in zip(gradients(), want, strict=True))


def test_a_dropout_of_weights_is_the_modules(x: Tensor) -> None:
    net = Net(plain)
    with heedful.attach(net, heedful.edit(Site.PATTERN, lambda p, call: p + 0), inputs=x) as run:
        torch.manual_seed(1)
        one, two = run(x), run(x)
        assert not close(one, two)
        net.eval()
        assert close(run(x), run(x))


def test_masks_are_told_as_rules(x: Tensor) -> None:
    seen: list[Any] = []
    net = Net(masked).eval()
    with heedful.attach(net, heedful.edit(Site.MASK, lambda mask, call: seen.append((mask, call)) or mask)) as run:
        run(x)
    mask, call = seen[0]
    assert mask.causal
    assert len(mask.rules) == 2
    assert call.queries.position[0].flatten().tolist()[2:] == [0, 1, 2, 3, 4]


# what cannot be followed


def talking(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = torch.einsum("bhij,hg->bgij", q @ k.transpose(-1, -2), torch.eye(H).roll(1, 0))
    weights = scores.softmax(-1)
    return weights @ v, weights


def summed_again(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    weights = weights / (1 + weights.sum(-1, keepdim=True))
    return weights @ v, weights


def emptied_too_far(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-1, -2)).softmax(-1).masked_fill(torch.ones(N, N).triu(1) > 0, 0.0)
    return weights @ v, weights


def over_queries(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-1, -2)).softmax(2)
    return weights @ v, weights


def from_the_right(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return (v.transpose(-1, -2) @ weights).transpose(-1, -2), weights


def capped(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = torch.tanh(q @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v, weights


def relative(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """What is near is weighed once more, as with relative values."""
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v + weights[..., :2] @ v[:, :, :2], None


def differential(net: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    one, two = (x @ k.transpose(-1, -2) for x in (q, -q))
    return one.softmax(-1) @ v - two.softmax(-1) @ v, None


@pytest.mark.parametrize(
    ("writes", "why"),
    [
        (talking, "a softmax of what is no product of queries and keys alone"),
        (capped, "a softmax of what is no product of queries and keys alone"),
        (summed_again, "its weights are changed after a softmax"),
        (emptied_too_far, "its weights are changed after a softmax"),
        (over_queries, "a softmax over axis 2"),
        (from_the_right, "its weights do not stand before the values"),
        (relative, "its weights go into __getitem__ too"),
        (differential, "2 calls in one forward"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(writes: Writes, why: str, x: Tensor) -> None:
    net = Net(writes).eval()
    with pytest.raises(RefusedModel, match=rf"layers\.0 \(Attention: .*{why}"):
        heedful.attach(net, HALVE, inputs=x)
    assert net(x).shape == x.shape


def test_what_was_not_seen_when_heedful_looked_is_refused(x: Tensor) -> None:
    net = Net(plain).eval()
    with heedful.attach(net, HALVE, inputs=x) as run:
        for layer in net.layers:
            layer.writes = summed_again
        with pytest.raises(NotEntered, match="computes attention otherwise than when heedful looked: its weights are"):
            run(x)
        for layer in net.layers:
            layer.writes = relative
        with pytest.raises(NotEntered, match="otherwise than when heedful looked: its weights go into __getitem__"):
            run(x)
        for layer in net.layers:
            layer.writes, layer.weights = plain, True
        with pytest.raises(NotEntered, match="gives its weights, which it did not when heedful looked"):
            run(x)


def test_weights_that_a_mixture_does_not_have_are_not_given(x: Tensor) -> None:
    net = Net(plain, weights=True).eval()
    mean = heedful.edit(Site.MIX, lambda qkv, call: call.spread(qkv[2]).mean(2, keepdim=True).expand_as(qkv[0]))
    with heedful.attach(net, mean) as run:
        assert run(x).shape == x.shape
        assert net.layers[0](x)[1] is None


def test_a_product_without_weights_is_none_of_ours() -> None:
    trail, a = Trail(), torch.randn(2, 3, 4)
    assert trail.asked(torch.matmul, (a, a.mT), {}) is None
    trail.follow(torch.matmul, (a, a.mT), {}, a @ a.mT)
    assert trail.asked(torch.matmul, (a, a.mT), {}) is None


# models of transformers


@pytest.fixture
def bloom() -> Any:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=128)).eval()


def prompts() -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_model_generates_as_before(bloom: Any) -> None:
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = bloom.generate(**prompts(), **how)
    with heedful.attach(bloom, heedful.edit(Site.MASK, lambda mask, call: mask), backend="reference") as run:
        assert run.layer_names == ("transformer.h.0.self_attention", "transformer.h.1.self_attention")
        assert torch.equal(bloom.generate(**prompts(), **how), want)


def test_padding_is_known_while_it_reads_and_while_it_writes(bloom: Any) -> None:
    places: list[list[int]] = []

    def note(q: Tensor, call: Any) -> Tensor:
        places.append(call.queries.position[0].flatten()[-2:].tolist())
        return q

    with heedful.attach(bloom, heedful.edit(Site.QUERY, note).on(layers=0)), torch.no_grad():
        bloom.generate(**prompts(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert places == [[4, 5], [6]]


def test_the_look_leaves_a_cache_as_it_was(bloom: Any) -> None:
    cache, ids = DynamicCache(config=bloom.config), prompts()["input_ids"]
    with torch.no_grad(), heedful.attach(bloom, HALVE) as run:
        run(ids, **{CACHE: cache})
    assert cache.get_seq_length() == ids.shape[1]


def test_maps_are_the_runs(bloom: Any) -> None:
    with heedful.attach(bloom, HALVE), torch.no_grad():
        maps = bloom(**prompts(), output_attentions=True).attentions
    assert all(close(m[1].sum(-1), torch.full_like(m[1].sum(-1), 0.5)) for m in maps)
    mean = heedful.edit(Site.MIX, lambda qkv, call: call.spread(qkv[2]))
    with heedful.attach(bloom, mean), pytest.raises(SiteError, match="computes no pattern"):
        bloom(**prompts(), output_attentions=True)


def test_what_is_learned_is_saved_and_loaded(bloom: Any, tmp_path: Path) -> None:
    from heedful.methods import GatedHeads

    with heedful.attach(bloom, GatedHeads()) as run, torch.no_grad():
        for p in run.parameters():
            p.add_(torch.randn_like(p))
        want = bloom(**prompts()).logits
        bloom.save_pretrained(tmp_path)
    with heedful.load(tmp_path) as loaded, torch.no_grad():
        assert torch.equal(loaded.model(**prompts()).logits, want)


def test_both_are_diagnosed(bloom: Any) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    encoder = MegatronBertModel(MegatronBertConfig(vocab_size=128, **size)).eval()
    for model in (bloom, encoder):
        found = heedful.diagnose(model, "The keys to the cabinet.", tokenizer=characters(), measures="SinkRate")
        assert f"{type(model).__name__}: 2 layers of 4 heads" in str(found)
