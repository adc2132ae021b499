"""Any stack or step as a model of lm-evaluation-harness, so that its tasks and your own files for it measure it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Self

from torch import nn

from heedful.bench.answer import answer, follow
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.kinds.tokens import Prompt
from heedful.tasks.task import Item
from heedful.text_models import Contender, text_model

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise HeedfulError("the adapter needs lm-evaluation-harness: pip install 'heedful[harness]'") from missing

Pair = tuple[Any, list[int], list[int]]  # the texts, and the tokens of context and continuation


class HeedfulLM(TemplateLM):
    """A model under a contender, one text at a time.

    A context is read in one call and its continuation after it token by token, so that what edits the cache acts as
    it does while decoding. lm-evaluation-harness's own models read both in one call, where such an edit does nothing.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, what: Contender | None, only: str | Iterable[str] | None, length: int
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, length
        self.text_model = text_model(model, what, only=only)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was."""
        self.text_model.close()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        asks = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **asks))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        start = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (start and string.startswith(start))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_more: Any) -> list[tuple[float, bool]]:
        found = []
        for _key, group in groupby(requests, key=lambda request: request[1]):  # one question, all its answers
            pairs = list(group)
            room = self.max_length - max(len(continuation) for _, _, continuation in pairs)
            if room < 1:
                raise FieldError(
                    self, "max_length", self.max_length, "holds no context beside an answer", 1 - room + self.max_length
                )
            last = self.text_model.read(Prompt(tuple(pairs[0][1][-room:])))[-1]
            for _, _, continuation in pairs:
                with self.text_model.branch():
                    likely, greedy = follow(self.text_model, last, tuple(continuation))
                found.append((float(likely.sum()), all(greedy)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that are each read in one call."""
        return [sum(self._window(*window) for window in self._windows(request.args[0])) for request in requests]

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        tokens, first = self.tok_encode(text), self.prefix_token_id
        windows = get_rolling_token_windows(tokens, prefix_token=first, max_seq_len=self.max_length, context_len=1)
        return map(make_disjoint_window, windows)

    def _window(self, context: list[int], continuation: list[int]) -> float:
        sheet = answer(self.text_model, Item(Prompt((*context, *continuation))))
        return -float(sheet.losses[-len(continuation) :].sum())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        asked: dict[str, Any] = normalize_gen_kwargs(settings)
        if asked.get("do_sample"):
            raise FieldError("generate_until", "do_sample", True, "a text is continued greedily", "do_sample: false")
        stops, most = [stop for stop in asked["until"] if stop], asked["max_gen_toks"]
        room = self.max_length - most
        if room < 1:
            raise FieldError("generate_until", "max_gen_toks", most, f"must be below {self.max_length} tokens", 32)
        logits = self.text_model.read(Prompt(tuple(self.tok_encode(context)[-room:])))[-1]
        out: list[int] = []
        while True:
            out.append(int(logits.argmax()))
            text = self.tokenizer.decode(out, skip_special_tokens=True)
            if out[-1] == self.eot_token_id or len(out) == most or any(stop in text for stop in stops):
                return str(postprocess_generated_text(text, stops, None))
            logits = self.text_model.go_on(out[-1])


def model(
    model: nn.Module,
    tokenizer: Any,
    what: Contender | None = None,
    *,
    only: str | Iterable[str] | None = None,
    max_length: int | None = None,
) -> HeedfulLM:
    """What `lm_eval.simple_evaluate(model=...)` takes; use it in a `with`, or close it. None is the unedited model."""
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return HeedfulLM(model, tokenizer, what, only, max_length or known or 2048)
