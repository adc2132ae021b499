"""linearity: do tokens that know more of their prefix go through the layers more linearly?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import apart
from claims.ledger import Claim, run
from heedful.explaining.linear import linearity
from heedful.explaining.states import streams

TEXTS, WORDS, LENGTH = 20, 170, 200  # tokens are cut at LENGTH
BEFORE = 3  # tokens of the prefix that are to be told
DEPTHS = (4, 9, 14, 19, 24)  # layers whose states may tell, of 30
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the states' mean square


def _ids(seed: int, fitting: bool) -> list[Tensor]:
    loaded = default()
    texts = (loaded.tokenizer(text, return_tensors="pt").input_ids for text in apart(seed, TEXTS, WORDS, fitting))
    return [ids[:, :LENGTH] for ids in texts]


def _known(ids: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of tokens with enough before them: their states at each depth, what stands before, and which they are."""
    model = default().model
    embedding = model.get_input_embeddings().weight.detach()
    states, before, which, first = [], [], [], 0
    for text in ids:
        found, n = streams(model, {"input_ids": text, "use_cache": False}), text.shape[1]
        layers = list(found.values())
        states.append([(x / x.norm(dim=1, keepdim=True))[BEFORE:] for x in (layers[depth] for depth in DEPTHS)])
        words = embedding[text[0]]
        before.append(torch.stack([words[i - BEFORE : i].flatten() for i in range(BEFORE, n)]))
        which.append(torch.arange(first + BEFORE, first + n))
        first += n
    return [torch.cat(each) for each in zip(*states, strict=True)], torch.cat(before), torch.cat(which)


def _missed(shown: Tensor, wanted: Tensor, by: tuple[Tensor, Tensor], ridge: float) -> Tensor:
    """The share of what stands before each token that ridge regression, fitted on other texts, misses."""
    mean, aim = by[0].mean(0), by[1].mean(0)
    x = by[0] - mean
    penalty = ridge * x.square().sum() / x.shape[1] * torch.eye(x.shape[1])
    probe = torch.linalg.solve(x.T @ x + penalty, x.T @ (by[1] - aim))
    return ((shown - mean) @ probe + aim - wanted).square().sum(1) / (wanted - aim).square().sum(1)


def _ranked(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([_ranked(x), _ranked(y)]))[0, 1])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    shown, wanted, _ = _known(_ids(seed, fitting=True))
    half = len(wanted) // 2
    choices = {
        (n, ridge): float(_missed(x[half:], wanted[half:], (x[:half], wanted[:half]), ridge).mean())
        for n, x in enumerate(shown)
        for ridge in RIDGES
    }
    depth, ridge = min(choices, key=choices.__getitem__)
    ids = _ids(seed, fitting=False)
    states, before, which = _known(ids)
    missed = _missed(states[depth], before, (shown[depth], wanted), ridge)
    told = linearity(default().model, [{"input_ids": text, "use_cache": False} for text in ids])
    bent = told.tokens[which]
    words = default().tokenizer.convert_ids_to_tokens(torch.cat(ids, 1)[0, which].tolist())
    marks = torch.tensor([not any(c.isalnum() for c in word) for word in words])
    drawn = bent[torch.randperm(len(bent), generator=torch.Generator().manual_seed(seed))]
    numbers = {
        "share of the prefix that is missed": float(missed.mean()),
        "the same of tokens without a letter": float(missed[marks].mean()),
        "linearity of layers": float(told.layers.mean()),
        "correlation with tokens drawn anew": correlation(missed, drawn),
        "depth that tells": float(DEPTHS[depth]),
        "tokens": float(len(bent)),
    }
    return correlation(missed, bent), numbers


CLAIM = Claim(
    key="P244",
    method="linearity",
    says="The more a token knows of its prefix, the more linearly it goes from layer to layer.",
    paper_number="a strong correlation (abstract)",
    setup=f"SmolLM2-135M on {TEXTS} pieces of Python's documentation of {LENGTH} tokens, other ones for each seed. "
    f"What a token knows: the share of the embeddings of the {BEFORE} tokens before it that ridge regression from "
    "its state misses, fitted on as many pieces of other topics, which choose the layer and the penalty; the authors "
    "train a copy of the model to write the whole prefix. (A probe of six tokens from all layers missed more than "
    "there was, and was given up.) Spearman's correlation over tokens of that share and of what linear maps leave, the "
    "mean over layers.",
    effect="rank correlation of what a token does not know of its prefix and how little linear it is",
    measure=measure,
    strong=0.2,
)

if __name__ == "__main__":
    run(CLAIM)
