"""Attribution and faithfulness: what is explained, what is removed, and what comes of it."""

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
from heedful.core.kinds import Prompt
from heedful.explaining.aim import aim_of
from heedful.explaining.attribution import attribute
from heedful.explaining.faithful import Faithfulness, Removal, faithfulness
from heedful.methods.explain.rollout import AttentionRollout
from heedful.methods.explain.transformer_attribution import TransformerAttribution
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
    assert found.tokens == list("abcab")
    assert len(found) == 5
    assert [float(x) for x in found] == found.scores.tolist()
    assert torch.equal(found[1:3], found.scores[1:3])
    best = int(found.scores.argmax())
    assert repr(found).startswith(f"5 tokens by {AttentionRollout()!r}, highest first: {best} '{'abcab'[best]}' ")
    with pytest.raises(FieldError, match=r"attribute\(\).tokenizer = None: is needed for a text"):
        attribute(model, "abc", AttentionRollout())
    one, other = (faithfulness(model, IDS[0, :5], x, steps=2, seeds=1) for x in (same, {"scores": same.scores}))
    assert torch.equal(one.deletion["scores"], other.deletion["scores"])


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


def log_chance(model: nn.Module, ids: Tensor, target: int, kept: list[int] | None = None) -> float:
    """With the model's own mask of attention."""
    mask = torch.ones_like(ids)
    if kept is not None:
        mask[0] = 0
        mask[0, kept] = 1
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=mask).logits[0, -1].log_softmax(-1)[target])


def test_curves_are_what_the_model_says_without_those_tokens() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    scores = torch.tensor([9.0, 1.0, 4.0, 3.0, 2.0, 5.0, 8.0])  # of the five that may go: 5, 2, 3, 4, 1
    found = faithfulness(model, IDS, scores, target=50, steps=5, seeds=1)
    whole = log_chance(model, IDS, 50)
    order = [5, 2, 3, 4, 1]
    falls = [log_chance(model, IDS, 50, [i for i in range(7) if i not in order[:c]]) - whole for c in range(6)]
    rises = [log_chance(model, IDS, 50, sorted([0, 6, *order[:c]])) - whole for c in range(6)]
    assert found.shares == (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert close_model(found.deletion["scores"].float(), torch.tensor(falls))
    assert close_model(found.insertion["scores"].float(), torch.tensor(rises))
    assert close_model(found.random_deletion[0, [0, 5]].float(), torch.tensor(falls)[[0, 5]])
    assert close(found.random_insertion[0].flip(0), found.random_deletion[0])


def test_tokens_can_be_replaced_instead() -> None:
    model = models.tiny("bert")
    scores = torch.arange(7.0)
    found = faithfulness(model, IDS, scores, target=50, position=3, removal=Removal((), token=2), steps=6, seeds=1)
    changed = IDS.clone()
    changed[0, [6, 5, 4]] = 2
    with torch.no_grad():
        a, b = (model(input_ids=x).logits[0, 3].log_softmax(-1)[50] for x in (changed, IDS))
    assert close_model(found.deletion["scores"][3].float(), a - b)
    changed[0, [0, 1, 2]] = 2  # all but the one that is predicted at
    with torch.no_grad():
        last = model(input_ids=changed).logits[0, 3].log_softmax(-1)[50]
    assert close_model(found.deletion["scores"][6].float(), last - b)


def test_gains_are_areas_against_random_order() -> None:
    falls, rises = torch.tensor([0.0, -3.0, -4.0]), torch.tensor([-4.0, -1.0, 0.0])
    random = torch.tensor([[0.0, -2.0, -4.0], [0.0, -1.0, -4.0]])
    found = Faithfulness("nats", 3, (0.0, 0.5, 1.0), {"a": falls}, {"a": rises}, random, random.flip(1))
    fall, rise = found.gains["a"]
    assert fall == pytest.approx(-1.75 - (-2.5))
    assert rise == pytest.approx(-1.5 - (-1.75))
    assert [f.key for f in found.figures] == ["deletion", "insertion"]
    assert set(found.figures[0].lines) == {"a", "random order"}
    assert "+0.750  +0.250" in str(found)


def test_the_tokens_that_matter_beat_random_order_and_the_others_lose() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    ids = torch.randint(3, 127, (1, 14), generator=torch.Generator().manual_seed(3))
    target = int(model(input_ids=ids).logits[0, -1].argmax())
    whole = log_chance(model, ids, target)
    harm = torch.tensor([whole - log_chance(model, ids, target, [j for j in range(14) if j != i]) for i in range(14)])
    gains = faithfulness(model, ids, {"best": harm, "worst": -harm}, steps=12, seeds=4).gains
    assert gains["best"][0] > 0 > gains["worst"][0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: faithfulness(m, IDS, torch.rand(6)), "finite scores"),
        (lambda m: faithfulness(m, IDS, torch.full((7,), float("nan"))), "finite scores"),
        (lambda m: faithfulness(m, IDS, torch.rand(7), steps=0), "both must be 1 or more"),
        (lambda m: faithfulness(m, IDS, torch.rand(7), removal=Removal(tuple(range(7)))), "leaves none"),
        (lambda m: faithfulness(m, IDS, torch.rand(7), target=128), "must be a token from 0 to 127"),
        (lambda m: attribute(m, IDS.expand(2, -1), AttentionRollout()), "one text of 2 tokens"),
        (lambda m: attribute(m, IDS, AttentionRollout(), position=7), "must be one of the 7 tokens"),
        (lambda m: attribute(m, IDS, Shares()), "must answer with one relevance"),
        (lambda m: attribute(m, IDS, TransformerAttribution().on(heads=[0])), "heads chosen by .on"),
    ],
)
def test_says_what_is_wrong(call, match: str) -> None:
    with pytest.raises(HeedfulError, match=match):
        call(models.tiny("llama"))
