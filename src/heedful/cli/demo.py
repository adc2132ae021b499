"""`heedful demo`: attach, observe, edit, stream, on the embedded model and text."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer

from heedful.cli.console import console
from heedful.cli.diagnose import diagnose

BAR = "▏▎▍▌▋▊▉█"


def bar(share: float, width: int = 30) -> str:
    """A share drawn as a bar."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (BAR[eighths % 8 - 1] if eighths % 8 else "")


def demo(
    context: typer.Context,
    length: Annotated[int, typer.Option(min=64, max=2048, help="How many tokens of the embedded text to read.")] = 512,
) -> None:
    """Take the tour: what a model's attention does, what an embedding is made of, reading with a short memory."""
    import torch

    from heedful import attach, explain, models
    from heedful.methods.explain.rollout import AttentionRollout
    from heedful.methods.observe.sink_rate import SinkRate
    from heedful.methods.sparse.prefill.sink_window import SinkWindow

    torch.set_grad_enabled(False)
    with console.status("loading the embedded model (the first time takes half a minute)"):
        model, tokenizer, name = models.default()
    text = files("heedful").joinpath("cli/text.txt").read_text()
    inputs = tokenizer(text, return_tensors="pt")
    ids = inputs.input_ids.repeat(1, -(-length // inputs.input_ids.shape[1]))[:, :length]
    console.print(f"[bold]{name}[/], {ids.shape[1]} tokens of text, {torch.get_num_threads()} threads\n")
    console.print("[bold]1. What its attention does[/]")
    diagnose(context, length=length)

    def loss() -> float:
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    encoder, words, encoder_name = models.encoder()
    sentence = words("The keys to the cabinet are on the table.", return_tensors="pt")
    rollout = AttentionRollout()
    with attach(encoder, rollout) as run:
        run(**sentence)
    shares = run[rollout][0][0, 0]
    console.print(
        f"\n[bold]2. What an embedding is made of[/] (attention rollout in {encoder_name}, as seen by its first token)"
    )
    for token, share in zip(words.convert_ids_to_tokens(sentence.input_ids[0]), shares, strict=True):
        console.print(f"   {token:>9} {float(share):>5.0%} {bar(float(share))}", style="cyan", markup=False)

    console.print("\n[bold]3. Reading with a short memory[/] (loss per token; 64 tokens of window)")
    rows = [("everything", None), ("4 sinks and a window", SinkWindow(4, 64)), ("the window alone", SinkWindow(0, 64))]
    for label, method in rows:
        if method is None:
            console.print(f"   {label:<22} {loss():.3f}")
            continue
        with attach(model, method) as run:
            value = loss()
        pairs = 2 * next(iter(run.activity().density.values()))
        console.print(f"   {label:<22} {value:.3f}   {pairs:.0%} of the causal pairs")

    console.print("\n[bold]4. How it was computed[/]")
    console.print(str(explain(SinkWindow(4, 64) | SinkRate())), markup=False)
    console.print("\nNext: [bold]heedful methods[/] lists what else there is, the README shows it from Python.")
