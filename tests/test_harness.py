"""lm-evaluation-harness asks a model under a stack, from a task file and a data file, offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from heedful import attach, models
from heedful.bench import harness
from heedful.bench.answer import answer
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.methods.sparse.cache.knorm import KNorm
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from heedful.tasks.task import Item
from heedful.text_models import text_model

WORDS = (
    "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "house", "and", "red", "blue", "green", "?", ":",
    "Question", "Answer",
)  # fmt: skip
ROWS = [
    {"question": "the cat sat on the", "choices": ["mat", "house and the dog", "red"], "gold": 0},
    {"question": "the dog ran to a", "choices": ["blue mat", "green house", "cat"], "gold": 2},
    {"question": "the house and the mat", "choices": ["sat", "ran", "the red cat"], "gold": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
output_type: multiple_choice
doc_to_text: "Question : {{{{question}}}} ? Answer :"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["red"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
ROLL = """
task: local_roll
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", vocab_size=len(WORDS) + 3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    for name, text in (("choice", CHOICE), ("write", WRITE), ("roll", ROLL)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluate(lm: Any, tasks: Any, name: str) -> dict[str, Any]:
    """What `simple_evaluate` does, but for asking the machine for its whole environment."""
    from lm_eval.evaluator import evaluate as run

    found = run(lm, tasks.load([name]), bootstrap_iters=0)
    return {"samples": found["samples"][name], **found["results"][name]}


@torch.no_grad()
def direct(model: Any, tokens: list[int], first: int) -> float:
    """The log-likelihood of the tokens from `first` on, all in one call."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return float(sum(logits[i - 1, tokens[i]] for i in range(first, len(tokens))))


def likelihoods(found: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([[likely for ((likely, _),) in sample["resps"]] for sample in found["samples"]])


def wanted(model: Any, tokenizer: Any, stack: Any) -> torch.Tensor:
    """What the choices get in one call each, as lm-evaluation-harness's own models read them."""
    with nullcontext() if stack is None else attach(model, stack):
        rows = []
        for row in ROWS:
            asked = tokenizer(f"Question : {row['question']} ? Answer :").input_ids
            rows.append([direct(model, asked + tokenizer(text).input_ids, len(asked)) for text in row["choices"]])
    return torch.tensor(rows)


@pytest.mark.parametrize("stack", [None, TempScale(2.0), TempScale(2.0) | SinkWindow(1, 4)], ids=str)
def test_choices_are_scored_as_by_the_model_itself(model: Any, tokenizer: Any, tasks: Any, stack: Any) -> None:
    with harness.model(model, tokenizer, stack) as lm:
        found = evaluate(lm, tasks, "local_choice")
    right = wanted(model, tokenizer, stack)
    assert close_model(likelihoods(found), right)
    gold = torch.tensor([row["gold"] for row in ROWS])
    assert found["acc,none"] == pytest.approx(float((right.argmax(-1) == gold).float().mean()))


def test_simple_evaluate_takes_a_task_file(model: Any, tokenizer: Any, tasks: Any) -> None:
    import lm_eval

    with harness.model(model, tokenizer, TempScale(2.0)) as lm:
        found = lm_eval.simple_evaluate(model=lm, tasks=["local_choice"], task_manager=tasks, bootstrap_iters=0)
        assert found["results"]["local_choice"]["acc,none"] == evaluate(lm, tasks, "local_choice")["acc,none"]


def test_a_stack_changes_what_is_scored_and_leaves_the_model_as_it_was(model: Any, tokenizer: Any, tasks: Any) -> None:
    before = wanted(model, tokenizer, None)
    assert not close_model(wanted(model, tokenizer, TempScale(2.0)), before)
    with harness.model(model, tokenizer, TempScale(2.0)) as lm:
        evaluate(lm, tasks, "local_choice")
    assert torch.equal(wanted(model, tokenizer, None), before)


def test_what_edits_the_cache_acts_on_the_answer(model: Any, tokenizer: Any, tasks: Any) -> None:
    stack = KNorm(budget=3)
    with harness.model(model, tokenizer, stack) as lm:
        found = likelihoods(evaluate(lm, tasks, "local_choice"))
    assert not close_model(found, wanted(model, tokenizer, None))
    with text_model(model, stack) as speaker:
        for row, got in zip(ROWS, found, strict=True):
            asked = tuple(tokenizer(f"Question : {row['question']} ? Answer :").input_ids)
            options = tuple(tuple(tokenizer(text).input_ids) for text in row["choices"])
            sheet = answer(speaker, Item(Prompt(asked), options))
            assert close_model(got, torch.stack([option.sum() for option in sheet.options]))


def test_texts_are_written_greedily_up_to_a_stop(model: Any, tokenizer: Any, tasks: Any) -> None:
    with harness.model(model, tokenizer, TempScale(2.0)) as lm:
        found = [sample["resps"][0][0] for sample in evaluate(lm, tasks, "local_write")["samples"]]
    for row, text in zip(ROWS, found, strict=True):
        ids = tokenizer(row["question"], return_tensors="pt").input_ids
        with attach(model, TempScale(2.0)):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("red")[0]
    assert any(found)


def test_whole_texts_are_scored_window_by_window(model: Any, tokenizer: Any, tasks: Any) -> None:
    for length in (512, 4):
        with harness.model(model, tokenizer, max_length=length) as lm:
            found = [sample["resps"][0][0] for sample in evaluate(lm, tasks, "local_roll")["samples"]]
        for row, got in zip(ROWS, found, strict=True):
            ids = [2, *tokenizer(row["question"]).input_ids]
            if length == 512:
                assert close_model(torch.tensor(got), torch.tensor(direct(model, ids, 1)))
            else:  # windows of four tokens: what stands in each is scored once
                last = direct(model, ids[-5:], 4 - (len(ids) - 1) % 4 + 1) if (len(ids) - 1) % 4 else 0.0
                first = direct(model, ids[:5], 1)
                assert close_model(torch.tensor(got), torch.tensor(first + last))


def test_long_contexts_lose_their_beginning(model: Any, tokenizer: Any) -> None:
    with harness.model(model, tokenizer, max_length=8) as lm:
        (short,), (long,) = (lm._loglikelihood_tokens([("", ids, [5, 6])]) for ids in ([4] * 6, [7] * 9 + [4] * 6))
        assert short == long
        with pytest.raises(FieldError, match="holds no context"):
            lm._loglikelihood_tokens([("", [3], [5] * 8)])
        with pytest.raises(FieldError, match="continued greedily"):
            lm._generate("the", {"do_sample": True, "until": []})
        with pytest.raises(FieldError, match="must be below 8"):
            lm._generate("the", {"max_gen_toks": 8, "until": []})
