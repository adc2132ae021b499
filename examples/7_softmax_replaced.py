# %% [markdown]
# # Softmax replaced, trained, and reloaded
#
# Softmax cannot abstain: its weights sum to one, whether or not there is anything to look at. What becomes of a small
# model that is trained with something else from the start, and does the replacement survive being saved?

# %%
from pydoc_data.topics import topics

import plotly.graph_objects as go
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import heedful
from heedful.methods import GatedHeads, SigmoidAttention

# %% [markdown]
# The data are the bytes of Python's own documentation; every tenth topic is held out. The model has two layers of
# four heads.

# %%
LENGTH = 128
parts = {True: bytearray(), False: bytearray()}
for number, (_, body) in enumerate(sorted(topics.items())):
    parts[number % 10 == 0] += body.encode() + b"\n"
rows = {held: torch.tensor(list(part))[: len(part) // LENGTH * LENGTH].view(-1, LENGTH) for held, part in parts.items()}
data = [{"input_ids": row, "labels": row} for row in rows[False]]
print(f"{len(data)} rows to train on, {len(rows[True])} held out, {LENGTH} bytes each")


def fresh() -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=512, **size))


# %% [markdown]
# Three mechanisms, the same weights, the same rows in the same order. Training is transformers' own `Trainer`; a
# method that learns, such as the gates, puts its parameters into the model, and the trainer finds them there.

# %%
mechanisms = {
    "softmax": heedful.Stack(),
    "sigmoid": SigmoidAttention(length=LENGTH),
    "softmax, gated heads": GatedHeads(),
}
how = {"per_device_train_batch_size": 16, "max_steps": 150, "learning_rate": 3e-3, "logging_steps": 5, "seed": 0}
quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}


@torch.no_grad()
def held_out(run: heedful.Run | LlamaForCausalLM) -> float:
    return run(input_ids=rows[True][:64], labels=rows[True][:64]).loss.item()


figure = go.Figure()
figure.update_layout(title="Training loss", xaxis_title="steps", yaxis_title="nats a byte")
for label, what in mechanisms.items():
    model = fresh()
    with heedful.attach(model, what) as run:
        trainer = Trainer(model, TrainingArguments("runs", **how, **quiet), train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.eval()
        model.save_pretrained(label)
        print(f"{label:<22} {model.num_parameters():>7} parameters   held-out loss {held_out(run):.3f}")
    log = [row for row in trainer.state.log_history if "loss" in row]
    figure.add_scatter(x=[row["step"] for row in log], y=[float(row["loss"]) for row in log], name=label)
figure

# %% [markdown]
# ## Reloaded
#
# `save_pretrained` wrote the weights, what was learned beside them, and the stack. `heedful.load` brings all three
# back in any process.

# %%
for label in list(mechanisms)[1:]:
    with heedful.load(label) as run:
        print(f"{run.stack!r:<60} held-out loss {held_out(run):.3f}")

# %% [markdown]
# What if somebody loads the folder by transformers alone? The weights fit, so it loads, and transformers prints that
# something is left over: "heedful.load brings back the stack". Taken as it is, the model computes softmax
# over weights that were trained for sigmoid; and heedful refuses to put another stack onto it.

# %%
alone = LlamaForCausalLM.from_pretrained("sigmoid")
print(f"by transformers alone: held-out loss {held_out(alone):.3f}")
try:
    heedful.attach(alone, GatedHeads())
except heedful.HeedfulError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## What to conclude
#
# In so short a training softmax with gated heads ends where softmax does; sigmoid attention begins faster and falls
# behind after some eighty steps. One seed of a tiny model is no verdict, and does not say why; `heedful lab` trains
# over seeds and tells the differences with their intervals. What holds at any size is the recipe: attach, train with
# any trainer, save. `heedful.load` gives the same model back, with the held-out loss that it was saved with. By
# transformers alone it computes something else, after a printed line that says so, and heedful refuses to put another
# stack onto it.
