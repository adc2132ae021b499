"""ReAGent: do the tokens that it names carry a language model's next word more than those that others name?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import sentences
from claims.ledger import Claim, run
from heedful.explaining import ReAGent, attribute, faithfulness
from heedful.methods.explain.rollout import AttentionRollout
from heedful.methods.explain.transformer_attribution import TransformerAttribution

SENTENCES, STEPS = 3, 20  # a seed; the steps of a run at most


def _gradient(ids: Tensor) -> dict[str, Tensor]:
    """Gradient norms of the likeliest next token's logit, and gradient times input, of every token."""
    model = default().model
    table = model.get_input_embeddings()
    embedded = table(ids).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs_embeds=embedded).logits[0, -1].max(), embedded)
    return {"gradient": grad[0].norm(dim=-1), "gradient times input": (grad * embedded.detach())[0].sum(-1).abs()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    numbers: dict[str, float] = {}
    for text in sentences(seed, SENTENCES, 8, 12):
        ids = tokenizer(text.rsplit(" ", 1)[0], return_tensors="pt").input_ids
        reagent = ReAGent(steps=STEPS, seed=seed)
        scores = {
            "ReAGent": attribute(model, ids, reagent).scores,
            "rollout": attribute(model, ids, AttentionRollout()).scores,
            "attribution": attribute(model, ids, TransformerAttribution()).scores,
            **_gradient(ids),
        }
        for name, (fall, rise) in faithfulness(model, ids, scores, steps=5, seeds=4).gains.items():
            for key, value in ((f"{name}, removed", fall), (f"{name}, put back", rise)):
                numbers[key] = numbers.get(key, 0.0) + value / SENTENCES
    both = {
        name.removesuffix(", removed"): (numbers[name] + numbers[name.replace("removed", "put back")]) / 2
        for name in numbers
        if name.endswith("removed")
    }
    others = {name: value for name, value in both.items() if name != "ReAGent"}
    return both["ReAGent"] - max(others.values()), numbers


CLAIM = Claim(
    key="P031",
    method="ReAGent",
    says="Recursive replacement names tokens that a generative model's next token hangs on more surely than gradients, "
    "attention and others do.",
    paper_number="none in the abstract; seven attributions, six models, three tasks, by Soft-NS and Soft-NC",
    setup=f"SmolLM2-135M-Instruct and the token that it holds likeliest behind {SENTENCES} sentences of Python's help "
    "texts without their last word, others for each seed. Runs of at most "
    f"{STEPS} steps, where the authors' have thousands, with tokens of the whole vocabulary put in. Tokens are hidden "
    "from all others, or put back, from the highest score down in 5 steps: the area under the log-probability, less "
    "that of random orders. Against the best of rollout, gradients through attention, gradient norms, and gradient "
    "times input.",
    effect="gain over random order, mean of removal and putting back, above that of the best other, in nats",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
