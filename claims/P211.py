"""NAP: does softmax isolate tokens before training, the more the longer the text, and does standardising not?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from claims._tiny_lm import LENGTH, Trained, fresh, text
from claims.ledger import Claim, run
from heedful import Site, attach, edit
from heedful.core.call import Call
from heedful.core.method import Part, Stack
from heedful.methods import NormalizedAttention

STEPS = 200
LENGTHS = (8, LENGTH)
TEXTS = 16


def norm(heads: Tensor, call: Call) -> Tensor:
    """A norm behind the heads, over all heads of a token; that of the authors takes their mean away too."""
    return heads * torch.rsqrt(heads.square().mean((1, 3), keepdim=True) + 1e-5)


def influence(what: Part | Stack, seed: int, length: int) -> float:
    """How much the last token's state depends on all others' embeddings, over how much on its own; log of the mean."""
    random = torch.Generator().manual_seed(seed)
    data = text(held_out=True)
    starts = torch.randint(0, len(data) - length, (TEXTS,), generator=random)
    ids = torch.stack([data[i : i + length] for i in starts.tolist()])
    model = fresh(seed)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    with attach(model, what) as attached:
        states = attached(inputs_embeds=embedded, use_cache=False, output_hidden_states=True).hidden_states[-1]
    along = torch.randn(states[:, -1].shape, generator=random)
    (gradient,) = torch.autograd.grad((states[:, -1] * along).sum(), embedded)
    others, own = gradient[:, :-1].square().sum((1, 2)).sqrt(), gradient[:, -1].norm(dim=-1)
    return float((others / own).mean().log())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    normed = edit(Site.HEAD_OUTPUT, norm)
    ways: dict[str, Part | Stack] = {
        "softmax": Stack(), "softmax, norm behind": normed, "NAP": NormalizedAttention(),
        "NAP, norm behind": NormalizedAttention() | normed,
    }  # fmt: skip
    numbers, growth = {}, {}
    for name, way in ways.items():
        short, long = (influence(way, seed, length) for length in LENGTHS)
        growth[name] = (long - short) / math.log(LENGTHS[1] / LENGTHS[0])
        numbers |= {f"log influence, {name}, {LENGTHS[0]}": short, f"log influence, {name}, {LENGTHS[1]}": long}
    numbers |= {f"exponent, {name}": x for name, x in growth.items()}
    for name in ("softmax", "NAP, norm behind"):
        numbers[f"loss, {name}"] = Trained(ways[name], seed, STEPS).loss()
    return growth["NAP, norm behind"] - growth["softmax"], numbers


CLAIM = Claim(
    key="P211",
    method="NormalizedAttention",
    says="Before training, softmax isolates tokens from one another the more the longer the text; NAP does not.",
    paper_number="none given in the abstract; more than 25,000 models trained",
    setup=f"Fresh 2-layer byte models on {TEXTS} texts of {LENGTHS[0]} and of {LENGTHS[1]} bytes: gradient of the last "
    "token's state by all other tokens' embeddings over that by its own, as a power of the length. NAP has a norm by "
    "the root mean square behind the heads, where the authors have a LayerNorm and a GELU. Details: with and without "
    f"that norm, and held-out loss after {STEPS} steps of training.",
    effect="exponent of the others' influence in the length, NAP's less softmax's",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
