"""Tasks of questions about pictures of the user's own, for models that read both."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from heedful.core.errors import FieldError, RefusedModel
from heedful.core.kinds.tokens import Prompt
from heedful.diagnosis.images import opened, processor_of
from heedful.shown import Shown
from heedful.tasks._own import Given, OwnChoices, OwnQuestions
from heedful.tasks._rows import Pictured
from heedful.tasks.task import Item, Tokenizer

# of a processor, and what is said where it is not there
NEEDED = {
    "tokenizer": "prepares pictures alone, and the questions are text",
    "image_token": "has no token that stands for a picture among a question's",
}


class AboutPictures(Given):
    """The picture, then the question, as the model's own template has them if its processor brings one."""

    def require(self, model: Any, tokenizer: Any) -> None:
        super().require(model, tokenizer)
        if "pixel_values" not in inspect.signature(model.forward).parameters:
            raise RefusedModel(
                f"{self.title} asks about pictures, and {type(model).__name__} takes no pixels; name a model that "
                "reads pictures and text, of AutoModelForImageTextToText"
            )
        processor_of(tokenizer, "compare()")
        for name, rule in NEEDED.items():
            if getattr(tokenizer, name, None) is None:
                given = type(tokenizer).__name__
                raise FieldError("compare()", "tokenizer", given, rule, "AutoProcessor.from_pretrained")

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        return asked(self.rows[self.place(tokenizer, number, seed)], tokenizer)


class PicturedChoices(AboutPictures, OwnChoices):
    """Questions about pictures with options, of which the likeliest has to be the right one."""

    name = "own picture choices"
    about = "Chooses the right answer to questions of your own about pictures."


class PicturedQuestions(AboutPictures, OwnQuestions):
    """Questions about pictures, each with the answer that a greedy continuation has to give word for word."""

    name = "own picture questions"
    about = "Answers questions of your own about pictures, word for word."


def asked(row: Pictured, processor: Any) -> Item:
    """The item: tokens with places for the picture, and what the processor makes of it."""
    picture, why = opened(Path(row.file))
    if why:
        raise FieldError("compare()", "tasks", row.image, f"{why}: take it out", "files that can be read")
    question = f"{row.context}\n\n{row.question}" if row.context else row.question
    if chats := bool(getattr(processor, "chat_template", None)):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{processor.image_token}\nQuestion: {question}\nAnswer:"
    found = dict(processor(images=picture, text=text, return_tensors="pt"))
    tokens, words = tuple(found.pop("input_ids")[0].tolist()), processor.tokenizer
    found.pop("attention_mask", None)  # nothing is padded
    options = tuple(
        tuple(words.encode(option if chats else f" {option}", add_special_tokens=False)) for option in row.options
    )
    place = words.convert_tokens_to_ids(str(processor.image_token))
    places = {i for i, token in enumerate(tokens) if token == place}
    if not places:
        raise FieldError("compare()", "tasks", row.image, "has no place in what the processor makes", "a processor")
    begins = max(places) + 1
    starts = sorted(i for i in places if i - 1 not in places)
    ends = sorted(i + 1 for i in places if i + 1 not in places)
    roles = {"image": tuple(zip(starts, ends, strict=True)), "question": ((begins, len(tokens)),)}
    # what is told of each token goes in with all of them at once
    each = any(isinstance(x, Tensor) and x.shape == (1, len(tokens)) for x in found.values())
    cut = None if each else begins
    labels: dict[str, float | str] = {"answer": row.options[0]} if row.options else {}
    return Item(Prompt(tokens, roles), options, cut, labels, Shown(found))
