# %% [markdown]
# # A steering vector, folded and saved
#
# Can one direction in the residual stream make a model speak well of things, and can that be handed on as a plain
# model? We find the direction from forty short phrases, turn it up and down beside random ones, and write it into the
# weights.

# %%
from dataclasses import replace

import plotly.graph_objects as go
import torch
from transformers import AutoModelForCausalLM

import heedful
from heedful.methods import SteeringVector

torch.set_grad_enabled(False)
model, tokenizer, name = heedful.models.default()
print(name)

# %% [markdown]
# ## Found
#
# `SteeringVector` takes the mean state of the last token over phrases with a trait, less that over phrases without, in
# each layer.

# %%
kind = "lovely wonderful delightful brilliant superb excellent charming great perfect beautiful".split()
unkind = "horrid terrible dreadful awful boring miserable ugly bad disgusting stupid".split()
batches = [
    {**tokenizer(f"{begin} {word}", return_tensors="pt"), "positive": words is kind}
    for words in (kind, unkind)
    for word in words
    for begin in ("It was really", "What I saw was")
]
vector = heedful.fit(SteeringVector(), model, batches)
print(f"{len(batches)} phrases, a vector for each of {len(vector.vectors)} layers")

# %% [markdown]
# ## Turned up and down
#
# The measure is the log-odds of eight kind words against eight unkind ones, none of which was used above, after eight
# new openings. The controls are five random directions of the same length: what merely disturbs the model moves the
# odds no particular way.

# %%
LAYER = 15
openings = [
    "I think that the film was", "The hotel we stayed at is", "Her new book is", "My neighbours are",
    "The food in this town is", "Our teacher was always", "The concert last night was", "People here are very",
]  # fmt: skip
good, bad = (
    torch.tensor([tokenizer(f" {word}").input_ids[0] for word in words.split()])
    for words in (
        "good nice fun amazing fantastic happy friendly interesting",
        "poor nasty sad annoying worst angry rude disappointing",
    )
)


def log_odds(run: heedful.Run | torch.nn.Module) -> torch.Tensor:
    """Of kind words against unkind ones, for each opening."""
    said = [run(**tokenizer(x, return_tensors="pt")).logits[0, -1] for x in openings]
    return torch.stack([x[good].logsumexp(0) - x[bad].logsumexp(0) for x in said])


def under(method: SteeringVector, strength: float) -> torch.Tensor:
    with heedful.attach(model, replace(method, strength=strength).on(layers=LAYER)) as run:
        return log_odds(run)


plain = log_odds(model)
length = float(vector.vectors[f"v.{LAYER}"].norm()) / model.config.hidden_size**0.5  # random ones: sqrt(width)
strengths = [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]
fitted = torch.stack([under(vector, s) - plain for s in strengths])  # [strengths openings]
random = torch.stack(
    [torch.stack([under(SteeringVector(seed=i), s * length) - plain for s in strengths]).mean(1) for i in range(5)]
)  # [directions strengths]
for i, s in enumerate(strengths):
    error = 2.36 * fitted[i].std() / len(openings) ** 0.5  # 95 % for eight openings, by Student's t
    low, high = random[:, i].aminmax()
    print(f"strength {s:+.1f}: fitted {fitted[i].mean():+.2f} ± {error:.2f} nats; random {low:+.2f} to {high:+.2f}")
figure = go.Figure()
axes = {"xaxis_title": "strength", "yaxis_title": "change of the log-odds (nats)"}
figure.update_layout(title=f"Kind words against unkind ones, steered at layer {LAYER}", **axes)
figure.add_scatter(x=strengths, y=fitted.mean(1).tolist(), name="fitted", line_width=3)
for i, row in enumerate(random.tolist()):
    grey = {"line_color": "#9aa0aa", "line_width": 1, "legendgroup": "random", "showlegend": i == 0}
    figure.add_scatter(x=strengths, y=row, name="five random ones", **grey)
figure

# %%
asked = tokenizer(openings[0], return_tensors="pt")
print(" 0:", tokenizer.decode(model.generate(**asked, max_new_tokens=14, do_sample=False)[0]))
for strength in (-2.0, 2.0):
    with heedful.attach(model, replace(vector, strength=strength).on(layers=LAYER)) as run:
        said = run.generate(**asked, max_new_tokens=14, do_sample=False)
    print(f"{strength:+.0f}: {tokenizer.decode(said[0])}")

# %% [markdown]
# ## Folded and saved
#
# A constant on top of the stream is a bias. `fold` writes it into the map that ends the layer; this model has no bias
# there, and its config a switch that gives it one. What comes out is a plain transformers model that needs no heedful.

# %%
steered = replace(vector, strength=1.0).on(layers=LAYER)
heedful.fold(model, steered).save_pretrained("kind")
again = AutoModelForCausalLM.from_pretrained("kind")
with heedful.attach(model, steered) as run:
    apart = float((run(**asked).logits - again(**asked).logits).abs().max())
print(type(again).__name__, "with mlp_bias =", again.config.mlp_bias)
print(f"largest difference of a logit to the steered run: {apart:.0e}")
print(f"change of the log-odds, loaded by transformers: {(log_odds(again) - plain).mean():+.2f} nats")

# %% [markdown]
# ## What to conclude
#
# In the choice of a word, yes. At half its length the vector moves the log-odds by 1.76 ± 0.55 nats one way and 2.49 ±
# 0.87 the other, factors of about six and twelve in the odds, as a mean over openings that the fit never saw; none of
# five random directions as long moves them by half a nat. More is not better: turned up to twice its length, the
# interval holds 0, and random directions move the odds as far. The continuations agree: turned down, the film is bad;
# turned up, it is no better than it was. Each interval is of eight openings and stands by itself. Layer 15 is the
# middle of the model; no other was tried here.
#
# Folded, the vector of strength 1 is one bias of one layer. The saved model is plain Llama, moves the odds by as much,
# and differs from the steered run by what rounding leaves.
