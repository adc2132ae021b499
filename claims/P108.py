"""Attention infers a latent edge: given the prior that edges have, is it nearer to Bayes' answer than softmax?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import BYTES, numbers
from claims.ledger import Claim, run
from heedful import Method
from heedful.methods import EdgePrior
from heedful.nn import Attention

TOKENS, WIDTH, BATCH, STEPS, RATE, TRIED = 16, 8, 64, 500, 1e-2, 2048
NOISE, DECAY = 0.7, 0.5  # of what a query tells of its key; what the logarithm of a chance loses with each token
FAR = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)  # how far behind each query a key stands
WAYS: dict[str, Method | None] = {"softmax": None, "prior": EdgePrior(0.0, TOKENS)}


def drawn(random: torch.Generator, rows: int, decay: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and the value at the end of each query's edge, `[b n e]`."""
    keys, values, noise = (torch.randn(rows, TOKENS, WIDTH, generator=random) for _ in range(3))
    keys = keys / keys.norm(dim=-1, keepdim=True)
    chances = torch.exp(-decay * FAR).masked_fill(FAR < 0, 0.0)
    edges = torch.multinomial(chances, rows, True, generator=random).T  # [b n]
    ends = edges[..., None].expand(-1, -1, WIDTH)
    return keys.gather(1, ends) + NOISE * noise, keys, values, values.gather(1, ends)


def bayes(queries: Tensor, keys: Tensor, values: Tensor, decay: float) -> Tensor:
    """What to answer, given the prior that falls so."""
    likelihood = -torch.cdist(queries, keys).square() / (2 * NOISE**2)
    return (likelihood - decay * FAR).masked_fill(FAR < 0, -torch.inf).softmax(-1) @ values


def error(method: Method | None, decay: float, seed: int) -> float:
    """The mean square error of trained attention on fresh texts."""
    torch.manual_seed(seed)
    attention, random = Attention(WIDTH, 1, method, causal=True, batch_first=True), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(attention.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        queries, keys, values, wanted = drawn(random, BATCH, decay)
        optimiser.zero_grad()
        (attention(queries, keys, values, need_weights=False)[0] - wanted).square().mean().backward()
        optimiser.step()
        rates.step()
    with torch.no_grad():
        queries, keys, values, wanted = drawn(torch.Generator().manual_seed(10_000 + seed), TRIED, decay)
        return float((attention(queries, keys, values, need_weights=False)[0] - wanted).square().mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {}
    for world, decay in (("near", DECAY), ("even", 0.0)):
        given = drawn(torch.Generator().manual_seed(10_000 + seed), TRIED, decay)
        for name, known in (("that knows the prior", decay), ("with an even prior", 0.0)):
            answer = bayes(*given[:3], known)
            found[f"error, {world} edges, Bayes {name}"] = float((answer - given[3]).square().mean())
        found |= {f"error, {world} edges, {name}": error(method, decay, seed) for name, method in WAYS.items()}
    gap = found["error, near edges, Bayes with an even prior"] - found["error, near edges, Bayes that knows the prior"]
    closed = (found["error, near edges, softmax"] - found["error, near edges, prior"]) / gap
    found |= {"share of the gap that the prior closes": closed, **numbers(WAYS, seed, "loss", course=BYTES)}
    return closed - 0.5, found


CLAIM = Claim(
    key="P108",
    method="EdgePrior",
    says="Attention is the mean of the values under a posterior over edges: with the prior that edges have it comes "
    "to Bayes' answer, where softmax has an even one.",
    paper_number="none given; the paper has no experiments",
    setup=f"Queries are noisy copies of one of up to {TOKENS} keys, near ones more often, and want its value; one "
    f"layer of one head, {STEPS} steps of {BATCH} texts, with softmax and with a learned prior over distances, and "
    "the same where all keys are as often meant. Among the details: the lab's text course with both.",
    effect="share that the prior closes of what Bayes' answers with an even and with the true prior differ, less half",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
