# %% [markdown]
# # A cache budget, chosen for my documents
#
# Papers promise that half of the keys and values in a cache can be dropped, or more, at hardly any cost: on their
# benchmarks, with their models. How much can *this* model drop on *my* documents?

# %%
from pathlib import Path

import heedful
from heedful.methods import KNorm, SinkWindow, SnapKV

loaded = heedful.models.default()
documents = heedful.tasks.from_file(Path(heedful.__file__).parent / "methods", length=128)
print(f"{documents.available(loaded.tokenizer):,} windows. {documents.about}")

# %% [markdown]
# The documents are the sources of heedful's own methods, in windows of 128 tokens; any folder of text does, or a JSONL
# file of questions. The first half of a window is read, the cache is cut to its budget, and the loss on the second
# half is the grade. We allow 0.1 nats a token. `SnapKV` keeps half of what was read, by what its last tokens look at;
# `KNorm` three quarters, by the norms of the keys; `SinkWindow` the first four tokens and the newest, 96 with the
# query's own.

# %%
methods = [SinkWindow(sinks=4, window=96), SnapKV(budget=0.5), KNorm(budget=0.75)]
found = heedful.compare(loaded, methods, [documents], prompts=40, minutes=60, margin=0.1, turns=1)
found

# %% [markdown]
# All were asked the same windows, thirty at first, then more until each verdict is known or forty are used up. An
# interval wholly above 0 is harm, unless it ends below the margin, which is safe; they hold all at once, whenever one
# stops asking, so taking the best of several flatters nobody. The times are of one turn on a busy machine, and tell
# nothing. Quality against the cache that is left:

# %%
found.plot.pareto_cache()

# %% [markdown]
# Attached, the method frees the memory as it goes, and the run tells how much.

# %%
text = (Path(heedful.__file__).parent / "api.py").read_text()
inputs = loaded.tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
with heedful.attach(loaded.model, methods[0]) as run:
    run.generate(**inputs, max_new_tokens=8, do_sample=False)
run.activity()

# %% [markdown]
# ## What to conclude
#
# Of these three, the plainest. The first four tokens and the newest, which at 128 tokens leave 78 % of the cache, cost
# 0.01 nats a token, and at most 0.033 with 95 % confidence: safe. KNorm holds about as much and costs 0.16 (0.09 to
# 0.23), and SnapKV at half costs 1.8 (1.2 to 2.3): both do harm, as thirty windows were enough to know. None of these
# settings halves the cache of this model on these documents for nothing.
#
# That is no verdict on the papers. They keep shares of long prompts and are asked questions about them; here 64 tokens
# are read and the text simply goes on, which suits whatever keeps the newest. It is why the question has to be put to
# one's own model and documents, at the length and with the kind of question that one has: change the first cell.
