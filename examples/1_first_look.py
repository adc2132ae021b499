# %% [markdown]
# # A first look
#
# What does the attention of a model do, before anybody edits it? We let a small language model read one text, ask
# what its heads were doing meanwhile, and then change one thing to see whether the answer was right.

# %%
from importlib.resources import files

import torch

import heedful
from heedful import Site

torch.set_grad_enabled(False)
model, tokenizer, name = heedful.models.default()
text = files("heedful").joinpath("cli/text.txt").read_text()
print(name, "reads", len(tokenizer(text).input_ids), "tokens:")
print(text[:160].replace("\n", " "), "...")

# %% [markdown]
# `diagnose` reads the text once. What it returns says in words what it found, most telling first; nothing was
# configured.

# %%
profile = heedful.diagnose(model, text, tokenizer=tokenizer)
profile

# %% [markdown]
# One finding stands out: most heads give the first token much more than it can deserve. Each cell below is one head;
# its colour is the share of all its attention that goes to the very first token of the text.

# %%
profile.plot.sinks()

# %% [markdown]
# The first layers read the text; from layer 12 on most heads are parked. Here is one of either kind on a sentence.
# Rows look at columns, and a parked head is a dark first column.

# %%
sentence = "When Mary and John went to the store, John gave a drink to Mary"
maps = heedful.patterns(model, sentence, tokenizer=tokenizer)
sinks = profile.figures()["sinks"].values  # [layers heads]
layer, head = divmod(int(sinks.argmax()), sinks.shape[1])
maps.plot(layer, head)

# %%
maps.plot(1, 0)

# %% [markdown]
# Does so much attention mean that so much is read there? Two edits tell. The first makes the *value* of the first
# token zero: heads look at it as before, and get nothing. The second forbids them to look at it. Neither needs a
# class; a plain function edits any site of the attention call.


# %%
def nothing_there(values: torch.Tensor, call: heedful.authoring.Call) -> torch.Tensor:
    return values.masked_fill((call.k_pos == 0)[..., None], 0.0)


def no_looking(scores: torch.Tensor, call: heedful.authoring.Call) -> torch.Tensor:
    return scores.masked_fill((call.pairs.k == 0) & (call.pairs.q > 0), -torch.inf)


inputs = tokenizer(text, return_tensors="pt")
asked = {**inputs, "labels": inputs.input_ids}
plain = model(**asked).loss.item()
print(f"{'unedited':<24} loss {plain:.2f}")
edits = {
    "the first value is zero": heedful.edit(Site.VALUE, nothing_there).on(layers=range(3, 30)),
    "nobody looks at it": heedful.edit(Site.SCORES, no_looking).on(layers=range(3, 30)),
}
for label, edit in edits.items():
    with heedful.attach(model, edit) as run:
        print(f"{label:<24} loss {run(**asked).loss.item():.2f}")
print("the model is what it was, bit for bit:", model(**asked).loss.item() == plain)

# %% [markdown]
# Taking away what is read there costs more than taking away the place. Where did the parked head go? The same map,
# under the edit that forbids the first column:

# %%
heedful.patterns(model, sentence, tokenizer=tokenizer, stack=edits["nobody looks at it"]).plot(layer, head)

# %% [markdown]
# ## What to conclude
#
# Most heads of the upper layers are parked on the first token. Which token that is does not matter: forbidden to look
# there, the head parks on the tokens that now come first, and the model reads the text almost as well as before. So
# the sink is a place, and the model finds another. It is not an empty place, though: with the value there set to zero
# the loss rises much more, so what parked heads read there is counted on. A pattern tells where a head looks; it
# takes an edit to tell what for.
