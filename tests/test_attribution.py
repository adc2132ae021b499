"""Attribution: what is explained of a text, and by how much each of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import heedful
from heedful import models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.kinds.tokens import Prompt
from heedful.explaining.aim import aim_of
from heedful.explaining.attribution import attribute
from heedful.explaining.replacing import ReAGent
from heedful.methods.explain.rollout import AttentionRollout
from heedful.methods.explain.transformer_attribution import TransformerAttribution
from heedful.models import Loaded
from tests.samples import Shares

IDS = torch.tensor([[5, 17, 9, 88, 40, 23, 61]])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "qwen3"])
def test_relevance_is_gradient_times_weights_rolled_out(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager", num_hidden_layers=3)
    output = model(input_ids=IDS, output_attentions=True)
    for x in output.attentions:
        x.retain_grad()
    output.logits[0, 4, 77].backward()
    wanted = torch.eye(7)
    for x in output.attentions:
        wanted = (torch.eye(7) + (x.grad[0] * x[0].detach()).clamp(min=0).mean(0)) @ wanted
    found = attribute(model, IDS, TransformerAttribution(), target=77, position=4)
    assert close_model(found.scores, wanted[4])
    assert not close_model(found.scores, torch.eye(7)[4])


def test_other_targets_have_other_relevances() -> None:
    model = models.tiny("llama")
    one, other = (attribute(model, IDS, TransformerAttribution(), target=t).scores for t in (7, 8))
    assert not close(one, other)
    likeliest = int(model(input_ids=IDS).logits[0, -1].argmax())
    assert torch.equal(
        attribute(model, IDS, TransformerAttribution()).scores,
        attribute(model, IDS, TransformerAttribution(), target=likeliest).scores,
    )


def test_it_reads_a_text_and_tells_the_tokens_that_matter_most() -> None:
    class Words:
        def __call__(self, text: str, **how: Any) -> Any:
            return {"input_ids": torch.tensor([[ord(x) for x in text]])}

        def batch_decode(self, ids: Tensor) -> list[str]:
            return [chr(i) for i in ids[:, 0].tolist()]

    model = models.tiny("llama")
    found = attribute(model, "abcab", AttentionRollout(), tokenizer=Words())
    same = attribute(model, torch.tensor([97, 98, 99, 97, 98]), AttentionRollout())
    assert torch.equal(found.scores, same.scores)
    assert found.tokens == attribute(Loaded(model, Words(), ""), "abcab", AttentionRollout()).tokens == list("abcab")
    assert len(found) == 5
    assert [float(x) for x in found] == found.scores.tolist()
    assert torch.equal(found[1:3], found.scores[1:3])
    best = int(found.scores.argmax())
    assert repr(found).startswith(f"5 tokens by {AttentionRollout()!r}, highest first: {best} '{'abcab'[best]}' ")
    with pytest.raises(FieldError, match=r"attribute\(\).tokenizer = None: is needed for a text"):
        attribute(model, "abc", AttentionRollout())


def test_a_forward_without_backward_has_no_relevance() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, TransformerAttribution()) as run:
        run(input_ids=IDS).logits[0, -1, 3].backward()
        with torch.no_grad():
            run(input_ids=IDS[:, :4])
    (found,) = run[TransformerAttribution()]
    assert found.shape == (1, 7, 7)
    assert not found.requires_grad


def test_reads_the_row_of_the_prediction_and_leaves_the_model_alone() -> None:
    model = models.tiny("llama").train()
    model.model.layers[0].eval()
    with heedful.attach(model, AttentionRollout()) as run, torch.no_grad():
        run(input_ids=IDS)
    (whole,) = run[AttentionRollout()]
    prompt = Prompt(tuple(IDS[0].tolist()))
    assert close(attribute(model, prompt, AttentionRollout()).scores, whole[0, -1])
    assert close(attribute(model, IDS[0].tolist(), AttentionRollout(), position=2).scores, whole[0, 2])
    assert model.training
    assert [layer.training for layer in model.model.layers] == [False, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_without_logits_the_mean_state_is_meant() -> None:
    model = models.tiny("bert").bert
    aim = aim_of(model, IDS, None, None)
    assert aim.kind == "states"
    with heedful.attach(model, AttentionRollout()) as run, torch.no_grad():
        out = run(input_ids=IDS)
    (whole,) = run[AttentionRollout()]
    assert close(attribute(model, IDS, AttentionRollout()).scores, whole[0].mean(0))
    assert close(aim.score(out, torch.ones(1, 7, dtype=torch.bool)), torch.ones(1))
    kept = torch.tensor([[True, True, False, True, True, True, True]])
    states = out.last_hidden_state[0]
    cosine = nn.functional.cosine_similarity(states[kept[0]].mean(0), states.mean(0), dim=0)
    assert close_model(aim.score(out, kept)[0], cosine)
    with pytest.raises(FieldError, match="has no logits"):
        attribute(model, IDS, AttentionRollout(), target=3)


def test_reagent_is_asked_for_its_scores_of_what_is_aimed_at() -> None:
    model, asks = models.tiny("llama"), ReAGent(runs=1, steps=1)
    found = attribute(model, IDS, asks, position=3)
    assert torch.equal(found.scores, asks.scores(model, IDS, aim_of(model, IDS, None, 3)))
    assert found.tokens == [f"{i} " for i in IDS[0].tolist()]


@pytest.mark.parametrize(("config", "place"), [("Llama", 6), ("GPT2", 6), ("Bert", 0)])
def test_a_class_is_read_where_the_whole_text_was_seen(config: str, place: int) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    made = getattr(transformers, f"{config}Config")(**sizes, intermediate_size=64, pad_token_id=0)
    model = getattr(transformers, f"{config}ForSequenceClassification")(made).eval()
    assert aim_of(model, IDS, None, None).position == place
    assert aim_of(model, IDS, None, -3).position == 4
    with heedful.attach(model, AttentionRollout()) as run, torch.no_grad():
        run(input_ids=IDS)
    (whole,) = run[AttentionRollout()]
    assert close(attribute(model, IDS, AttentionRollout()).scores, whole[0, place])
    assert int((whole[0, place] > 0).sum()) == 7


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: attribute(m, IDS.expand(2, -1), AttentionRollout()), "one text of 2 tokens"),
        (lambda m: attribute(m, IDS, AttentionRollout(), position=7), "must be one of the 7 tokens"),
        (lambda m: attribute(m, IDS, Shares()), "must answer with one relevance"),
        (lambda m: attribute(m, IDS, TransformerAttribution().on(heads=[0])), "heads chosen by .on"),
    ],
)
def test_says_what_is_wrong(call, match: str) -> None:
    with pytest.raises(HeedfulError, match=match):
        call(models.tiny("llama"))
