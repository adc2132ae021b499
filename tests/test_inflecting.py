"""Entropy, gradients of the stream and of attention's weights against hooks on the model's own modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, RefusedModel
from heedful.explaining import Inflection, inflection
from tests.readers import ids


def by_hand(kind: str, batches: list[dict]) -> tuple[list[float], list[float], list[float], float]:
    """Entropies, gradients of streams, and of the attention's weights, means over batches; and the loss."""
    model = models.tiny(kind, attn_implementation="eager", num_hidden_layers=3)
    blocks = model.model.layers if kind == "llama" else model.bert.encoder.layer
    entropies, flows, lengths, loss = [0.0] * 3, [0.0] * 4, [0.0] * 3, 0.0
    for batch in batches:
        model.zero_grad()
        kept: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...], kept: list[Tensor] = kept) -> None:
            args[0].retain_grad()
            kept.append(args[0])

        def behind(module: nn.Module, args: object, out: object, kept: list[Tensor] = kept) -> None:
            x = out if isinstance(out, Tensor) else out[0]
            x.retain_grad()
            kept.append(x)

        hooks = [blocks[0].register_forward_pre_hook(before)]
        hooks += [block.register_forward_hook(behind) for block in blocks]
        out = model(**batch, output_attentions=True)
        out.loss.backward()
        for hook in hooks:
            hook.remove()
        loss += out.loss.item() / len(batches)
        for n, maps in enumerate(out.attentions):
            rows = maps.detach().flatten(0, 2).tolist()
            entropies[n] += sum(-sum(p * math.log(p) for p in row if p > 0) for row in rows) / len(rows) / len(batches)
            part = blocks[n].self_attn if kind == "llama" else blocks[n].attention
            length = math.sqrt(sum(float(p.grad.square().sum()) for p in _own(part)))
            lengths[n] += length / len(batches)
        for n, x in enumerate(kept):
            flows[n] += float(x.grad.square().sum().sqrt()) / len(batches)
    return entropies, flows, lengths, loss


def _own(part: nn.Module) -> list[nn.Parameter]:
    """BERT's attention holds its output projection, and a norm, beside the module that attends."""
    return list(part.self.parameters() if hasattr(part, "self") else part.parameters())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_what_hooks_find(kind: str) -> None:
    batches = [{"input_ids": ids(9, n, 2), "labels": ids(9, n, 2)} for n in range(2)]
    found = inflection(models.tiny(kind, num_hidden_layers=3), batches)
    entropies, flows, lengths, loss = by_hand(kind, batches)
    assert close(found.entropy.float(), torch.tensor(entropies))
    assert close(found.flow.float(), torch.tensor(flows))
    assert close(found.weights.float(), torch.tensor(lengths))
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_sharp_layers_where_gradients_fall_come_first() -> None:
    # entropies 1, 3, 2, 2: mean 2, deviation sqrt(1/2); decays ln 2, 0, ln 4, 0: mean 3/4 ln 2
    entropy = torch.tensor([1.0, 3.0, 2.0, 2.0])
    flow = torch.tensor([1.0, 2.0, 2.0, 8.0, 8.0])
    found = Inflection(entropy, flow, torch.ones(4), 1.5)
    decay = [math.log(2), 0.0, math.log(4), 0.0]
    assert found.decay.tolist() == pytest.approx(decay)
    mean = sum(decay) / 4
    spread = math.sqrt(sum((x - mean) ** 2 for x in decay) / 4)
    wanted = [(x - mean) / spread - (h - 2) / math.sqrt(0.5) for x, h in zip(decay, (1, 3, 2, 2), strict=True)]
    assert found.score.tolist() == pytest.approx(wanted)
    assert found.top(3) == [0, 2, 3]
    assert found.top() == [0, 2]
    figure = found.figure
    assert figure.rows == ["sharpness", "decay", "both"]
    assert figure.columns == ["0", "1", "2", "3"]
    assert figure.values[0].tolist() == pytest.approx([math.sqrt(2), -math.sqrt(2), 0, 0])
    assert torch.equal(figure.values[2], found.score)
    assert repr(found).splitlines()[:4] == [
        "loss 1.500; entropy, decay of gradients,",
        "and both in standard deviations, by layer",
        "layer  entropy   decay    both",
        "    0     1.00   +0.69   +1.72",
    ]
    assert "inflection" in found._repr_html_().lower()
    even = Inflection(torch.ones(4), flow, torch.ones(4), 1.5)
    assert even.score.tolist() == pytest.approx([(x - mean) / spread for x in decay])


@pytest.mark.usefixtures("poison")
def test_padding_does_not_count() -> None:
    model = models.tiny("llama")
    text = ids(9)
    padded = torch.cat([text, torch.full((1, 4), 90)], 1)
    mask = torch.cat([torch.ones_like(text), torch.zeros(1, 4, dtype=torch.long)], 1)
    alone = inflection(model, [{"input_ids": text}])
    beside = inflection(model, [{"input_ids": padded, "attention_mask": mask}])
    for name in ("entropy", "flow", "weights"):
        assert close(getattr(beside, name).float(), getattr(alone, name).float())


def test_the_model_and_its_gradients_stay() -> None:
    model = models.tiny("llama").train().requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        found = inflection(model, [{"input_ids": ids(9)}])
    assert bool((found.flow > 0).all())
    assert bool((found.weights > 0).all())
    assert model.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_says_what_is_wrong() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match="1 or more"):
        inflection(model, [])
    with pytest.raises(FieldError, match="by name"):
        inflection(model, ids(9))  # type: ignore[arg-type]
    with pytest.raises(RefusedModel):
        inflection(nn.Linear(2, 2), [{"input_ids": ids(9)}])
    with pytest.raises(RefusedModel, match="gives no loss"):
        inflection(model.model, [{"inputs_embeds": torch.randn(1, 5, 32)}])
    with pytest.raises(FieldError, match="a loss that is a number"):
        inflection(model, [{"input_ids": ids(9), "labels": torch.full((1, 9), -100)}])
    with pytest.raises(FieldError, match="1 layer or more"):
        inflection(model, [{"input_ids": ids(9)}]).top(0)
    t5 = models.tiny("t5")
    inputs = {name: x for name, x in models.tiny_inputs(t5, length=8).items() if name != "decoder_input_ids"}
    batch = inputs | {"labels": inputs["input_ids"]}
    with pytest.raises(FieldError, match="one stack of layers"):
        inflection(t5, [batch])
    assert inflection(t5, [batch], only="encoder").flow.shape == (3,)
