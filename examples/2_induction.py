# %% [markdown]
# # Induction heads: found, ablated, patched
#
# A language model that meets `A B ... A` for the second time says `B`. Which of its heads do this? We look for them
# by what they look at, then take them away, then ask for the heads that an answer depends on without having looked at
# any pattern.

# %%
import plotly.graph_objects as go
import torch

import heedful
from heedful.explaining import patching
from heedful.methods import InductionHeads

torch.set_grad_enabled(False)
model, tokenizer, name = heedful.models.default()

# %% [markdown]
# ## Found
#
# Random tokens, twice. Nothing but the first half helps with the second, so whoever predicts the second half copies.
# The reader `InductionHeads` measures how much of its attention each head gives to the token after the earlier copy.

# %%
draw = torch.Generator().manual_seed(0)
once = torch.randint(1000, 40_000, (4, 32), generator=draw)
ids = once.repeat(1, 2)
reader = InductionHeads(period=32)
with heedful.attach(model, reader) as run:
    run(input_ids=ids)
found = run[reader]
heads = list(found.heads("induction", above=0.3))
print(f"{len(heads)} of {len(found.induction) * 9} heads, best first:", *(f"{i}.{j}" for i, j in heads))
print(found)

# %% [markdown]
# The pattern of the best one, on a text of four words that come three times. As long as nothing comes again it is
# parked on the first token; then each token looks at what *followed* it the time before, which is the dark diagonal.

# %%
words = " red stone river north" * 3
heedful.patterns(model, words, tokenizer=tokenizer, heads=heads[:1]).plot(*heads[0])

# %% [markdown]
# ## Ablated
#
# A pattern shows where a head looks and not that anybody listens. So we let the best heads hand over their mean,
# whatever they read, and compare with as many random others. What counts is the loss on the second half; the first
# half is pure chance.


# %%
def repeated(logits: torch.Tensor) -> float:
    """The loss on the second half, in nats a token."""
    said = logits[:, 32:-1].log_softmax(-1)
    return -said.gather(-1, ids[:, 33:, None]).mean().item()


def without(which: list[tuple[int, int]]) -> float:
    with heedful.ablate(model, which, mean=list(once)) as run:
        return repeated(run(input_ids=ids).logits)


counts = [1, 2, 4, 8, len(heads)]
others = [divmod(i, 9) for i in torch.randperm(270, generator=draw).tolist()]
others = [head for head in others if head not in heads]
plain = repeated(model(input_ids=ids).logits)
lines = {"induction heads, best first": heads, "random other heads": others}
figure = go.Figure()
figure.update_layout(
    title="Copying without heads", xaxis_title="heads taken away", yaxis_title="loss on the copy (nats)"
)
for label, which in lines.items():
    losses = [plain] + [without(which[:n]) for n in counts]
    print(f"{label:<28}", *(f"{n}: {x:.2f}" for n, x in zip([0, *counts], losses, strict=True)), sep="   ")
    figure.add_scatter(x=[0, *counts], y=losses, name=label)
figure

# %% [markdown]
# ## Patched
#
# Now the other way round, without looking at patterns. In the corrupt prompts the first half is other tokens, and the
# answer is lost. Each head's output on the clean prompts is put into the corrupt run, and its share is how much of
# the answer it alone brings back: here the first-order estimate, which takes two forwards and a backward for all 270
# heads.

# %%
clean = ids[:2, :49]
corrupt = torch.cat([torch.randint(1000, 40_000, (2, 32), generator=draw), clean[:, 32:]], 1)
answer = ids[:2, 49:50]


def says(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].log_softmax(-1).gather(-1, answer)[:, 0]


effects = patching(model, clean, corrupt, says, estimate=True)
both = set(effects.top(12)) & set(heads)
print(f"of its 12 largest effects {len(both)} are induction heads; chance is {12 * len(heads) / 270:.1f}")
effects

# %% [markdown]
# ## What to conclude
#
# Twelve of 270 heads look at what followed, and copying hangs on them: without them the loss on the copy more than
# quadruples, without as many others it hardly moves. The best one matters most, and without it alone much of copying
# remains. Patching, which saw no pattern, has six of them among its own dozen, where chance would put half a head.
# Among the rest are a head of the last layer and, against the answer, heads of the first two, none of which the
# pattern names; and the effects are first-order estimates. Where a head looks, whether it is needed, and whether it
# suffices are three questions; ask all three before naming a circuit.
