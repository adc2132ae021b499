"""Linear self-attention trained on regression in its context: is it one step of gradient descent?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from claims.ledger import Claim, run
from heedful.methods import LinearSelfAttention
from heedful.nn import Attention

SIZE, EXAMPLES, NOISE = 5, 20, 0.5
ROWS, STEPS, TRIED = 256, 3000, 20_000  # texts of a batch, batches, texts in the end
EVEN, SKEWED = torch.ones(SIZE), torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25])  # variances of the inputs

Problem = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs [b n d], answers [b n], the input asked [b d], its answer [b]


def drawn(rows: int, variances: Tensor, random: Generator) -> Problem:
    """Regressions of which one input in each has no answer; the weights are as large as the inputs are small."""
    x = torch.randn(rows, EXAMPLES + 1, SIZE, generator=random) * variances.sqrt()
    w = torch.randn(rows, SIZE, generator=random) / variances.sqrt()
    y = (x @ w[..., None])[..., 0] + NOISE * torch.randn(rows, EXAMPLES + 1, generator=random)
    return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


def asked(layer: Attention, problem: Problem) -> Tensor:
    """What the layer says of each input that has no answer."""
    x, y, last, _ = problem
    rest = layer.embed_dim - SIZE - 1
    question = torch.nn.functional.pad(last, (0, rest + 1))[:, None]
    told = torch.cat([torch.nn.functional.pad(x, (0, rest)), y[..., None]], -1)
    return layer(question, told, told)[0][:, 0, -1]  # type: ignore[no-any-return]


def untrained(method: LinearSelfAttention | None, seed: int, heads: int = 1) -> Attention:
    """One layer of random weights, whose heads are as wide as an example."""
    torch.manual_seed(seed)
    return Attention(heads * (SIZE + 1), heads, method, bias=False, batch_first=True)


def trained(method: LinearSelfAttention | None, variances: Tensor, seed: int, heads: int = 1) -> Attention:
    """Such a layer after its training."""
    layer = untrained(method, seed, heads)
    random = Generator().manual_seed(1000 + seed)
    optimiser = torch.optim.Adam(layer.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        problem = drawn(ROWS, variances, random)
        loss = (asked(layer, problem) - problem[3]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return layer


def unlike(said: Tensor, step: Tensor) -> float:
    """The share of what is said that no multiple of a step explains."""
    size = (said @ step) / step.square().sum()
    return float((said - size * step).square().sum() / said.square().sum())


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {}
    with torch.enable_grad():
        layers: dict[str, tuple[Attention, Tensor]] = {
            "linear, even": (trained(LinearSelfAttention(), EVEN, seed), EVEN),
            "softmax, even": (trained(None, EVEN, seed), EVEN),
            "linear, skewed": (trained(LinearSelfAttention(), SKEWED, seed), SKEWED),
        }
    steps: dict[str, Callable[[Problem, Tensor], Tensor]] = {
        "a step": lambda p, _: torch.einsum("bn,bnd,bd->b", p[1], p[0], p[2]),
        "a preconditioned step": lambda p, variances: torch.einsum("bn,bnd,bd->b", p[1], p[0] / variances, p[2]),
    }
    for name, (layer, variances) in layers.items():
        problem = drawn(TRIED, variances, Generator().manual_seed(5000 + seed))
        said = asked(layer, problem)
        found[f"{name}: error"] = float((said - problem[3]).square().mean())
        for step, made in steps.items():
            found[f"{name}: unlike {step}"] = unlike(said, made(problem, variances))
    best = EXAMPLES / (EXAMPLES * (EXAMPLES + SIZE + 1) + EXAMPLES * SIZE * NOISE**2)
    problem = drawn(TRIED, EVEN, Generator().manual_seed(5000 + seed))
    found["the best step: error"] = float((best * steps["a step"](problem, EVEN) - problem[3]).square().mean())
    even = found["softmax, even: unlike a step"] - found["linear, even: unlike a step"]
    skewed = found["linear, skewed: unlike a step"] - found["linear, skewed: unlike a preconditioned step"]
    return min(even, skewed), found


CLAIM = Claim(
    key="P008",
    method="LinearSelfAttention",
    says="One layer of linear self-attention that is trained on regressions in its context learns one step of gradient "
    "descent, and a preconditioned one where the inputs' variances are unlike.",
    paper_number="a proof: the global minimiser is exactly that step",
    setup=f"One head, trained on {STEPS} batches of {ROWS} fresh regressions: {SIZE} inputs, {EXAMPLES} examples. "
    "Of what it says of fresh ones, the share that no multiple of a step explains: less than of a softmax layer "
    "trained alike, and, where variances go from 4 to 1/4, less for the preconditioned step than for the plain one.",
    effect="the smaller of the two differences, in shares of what is said",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
