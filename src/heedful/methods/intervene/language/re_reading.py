"""Q, read the question again, Q: what is asked stands twice, so that its second copy sees all of the first."""

from __future__ import annotations

from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt, RoleName


class ReReading(Tokens):
    """Repeats the question behind itself; each word of a later copy sees the whole of an earlier one.

    Whatever is marked within the question is marked in each copy too: the role `question` then has as many spans as
    there are copies. `lead` is given in tokens, as `tuple(tokenizer("\\nRead the question again: ").input_ids)`.
    """

    paper = Paper(
        "P063",
        "Re-Reading Improves Reasoning in Language Models",
        "Xiaohan Xu, Chongyang Tao, Tao Shen, Can Xu, Hongbo Xu, Guodong Long, Jian-Guang Lou, Shuai Ma",
        2023,
        "2309.06275",
        "EMNLP 2024",
        differs=(
            "The words between the copies are tokens that the user gives, and none if left out; the authors': Read the "
            "question again.",
            "Thoughts step by step and votes over answers, which the authors combine it with, are not part of it.",
        ),
    )
    lead: tuple[
        NonNegativeInt, ...
    ] = ()  # token ids before each later copy; the authors: of "Read the question again:"
    times: PositiveInt = 2  # how often the question is read; the paper: 2, and up to 5 in its ablation
    role: RoleName = "question"  # the role that names the question's one span

    @classmethod
    def neutral(cls) -> ReReading:
        return cls(times=1)

    @classmethod
    def example(cls) -> ReReading:
        return cls((5, 7))

    def adds(self, prompt: Prompt) -> tuple[int, ...]:
        return (self.times - 1) * (self.lead + self._question(prompt).tokens)

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        question = self._question(prompt)
        stop = prompt.spans(self.role)[0][1]
        for _ in range(self.times - 1):
            prompt = prompt.inserted(stop, question)
            prompt = prompt.inserted(stop, Prompt(self.lead)) if self.lead else prompt
        return prompt

    def _question(self, prompt: Prompt) -> Prompt:
        """What is repeated, and all that is marked in it."""
        spans = prompt.spans(self.role)
        if len(spans) != 1:
            raise FieldError(self, "role", spans, "must name one span", {self.role: ((0, 4),)})
        return prompt.piece(*spans[0])


if __name__ == "__main__":
    from heedful import arrange, models

    model, tokenizer, _ = models.default()
    question = tokenizer("Q: Anna is taller than Boris, who is taller than Clara. Who is the tallest?").input_ids
    asked = Prompt((*question, *tokenizer("\nA:").input_ids), {"question": ((0, len(question)),)})
    again = ReReading(tuple(tokenizer("\nRead the question again: ").input_ids))
    print(tokenizer.decode(arrange(model, asked, again).tokens))
