"""Each layer by itself: mean (y' - y)^2; then the whole: KL(p || p') + features (1 - cos(x', x))."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from heedful.core.kinds.conversion import Conversion
from heedful.core.paper import Paper


class AttentionEditing(Conversion):
    """Swaps attention in the layers of its target, teaches these one by one, then the whole model.

    `run = heedful.fit(AttentionEditing(SinkWindow(4, 256) | GatedHeads(fine_tune=True)), model, batches, out="kept")`;
    `run.model.save_pretrained(folder)` saves it, `heedful.load(folder)` gives it back.
    """

    paper = Paper(
        "P298",
        "Attention Editing: A Versatile Framework for Cross-Architecture Attention Conversion",
        "Zhen Cheng, Hao-Bo Yang, Wan-Yi Huang, Jin-Long Li",
        2026,
        "2604.05688",
        differs=(
            "Written from the abstract and summaries of the paper: its stages are the paper's, while its rates, "
            "schedules and the places of its features were not at hand. Here Adam has constant rates, and the features "
            "are the stream as it leaves each converted layer.",
            "The target is any stack: what it learns is new, and the layer's projections begin as they were. The "
            "paper's latent attention has projections of its own; its GateSWA is written here as SinkWindow | "
            "GatedHeads(whole=True), with one gate a head from the layer's input.",
            "All layers are taught in one forward: each is shown the model's own input, so that none feels another.",
            "The second stage trains every weight of the copy.",
        ),
    )

    @classmethod
    def example(cls) -> AttentionEditing:
        from heedful.methods.sparse.prefill.sink_window import SinkWindow

        return cls(SinkWindow(1, 4))

    def of_layer(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).square().mean()

    def of_whole(self, found: Tensor, wanted: Tensor) -> Tensor:
        q, p = (x.log_softmax(-1) for x in (found, wanted))
        return kl_div(q, p, reduction="batchmean", log_target=True)

    def of_stream(self, found: Tensor, wanted: Tensor) -> Tensor:
        return 1 - cosine_similarity(found, wanted, dim=-1).mean()


if __name__ == "__main__":
    from heedful import fit, models
    from heedful.methods import GatedHeads, SinkWindow

    model = models.tiny("llama")
    how = AttentionEditing(SinkWindow(1, 8) | GatedHeads(fine_tune=True), layer_epochs=20, epochs=20)
    with fit(how, model, [models.tiny_inputs(model)], progress=print) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
