"""A question on one of several documents."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from heedful.tasks._draft import Draft
from heedful.tasks._texts import NAMES
from heedful.tasks.task import Choice, Item, Tokenizer

SURNAMES = (
    "Baker", "Carter", "Dixon", "Fisher", "Grant", "Harper", "Mason", "Palmer", "Reed", "Shaw", "Turner", "Webb",
)  # fmt: skip
CITIES = (
    "Lisbon", "Vienna", "Oslo", "Cairo", "Madrid", "Dublin", "Prague", "Athens", "Warsaw", "Boston", "Tokyo", "Rome",
)  # fmt: skip
TRADES = (
    "carpenter", "nurse", "lawyer", "painter", "baker", "farmer", "pilot", "chemist", "teacher", "tailor", "sailor",
    "cook",
)  # fmt: skip
LOVES = (
    "chess", "music", "football", "poetry", "gardening", "swimming", "photography", "history", "astronomy", "dancing",
    "fishing", "tennis",
)  # fmt: skip
QUESTIONS = (
    ("Where was {} born?", "{} was born in"),
    ("What is the trade of {}?", "{} works as a"),
    ("What does {} love?", "{} loves"),
)


class DocumentQA(Choice):
    """Short lives of invented people, one a document, and a question on one; the answers of the others are options."""

    name = "documents"
    about = "Answers a question on one of several documents, by the document's place."
    documents: Annotated[int, Interval(ge=2, le=len(CITIES))] = 6  # people

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        draw, asked = self.draw(seed, number), number % self.documents
        people = [f"{first} {last}" for first, last in zip(
            draw.sample(NAMES, self.documents), draw.sample(SURNAMES, self.documents), strict=True)]  # fmt: skip
        facts = [draw.sample(of, self.documents) for of in (CITIES, TRADES, LOVES)]
        sort = draw.randrange(3)
        draft = Draft()
        draft.add("Answer the question from the documents.\n")
        context = len(draft.text)
        for i, person in enumerate(people):
            start = draft.add(f"Document: {person}\n")
            for j, (_, says) in enumerate(QUESTIONS):
                fact = draft.add((" " if j else "") + says.format("He" if j else person))
                draft.add(f" {facts[j][i]}.")
                if (i, j) == (asked, sort):
                    draft.mark("needle", fact)
            draft.add("\n")
            draft.mark("documents", start)
        draft.mark("context", context)
        question, says = QUESTIONS[sort]
        cut = draft.add(f"Question: {question.format(people[asked])}\nAnswer: {says.format(people[asked])}", "question")
        options = [facts[sort][asked], *(fact for i, fact in enumerate(facts[sort]) if i != asked)][:4]
        return draft.item(
            tokenizer, [f" {o}" for o in options], cut=cut, labels={"depth": asked / (self.documents - 1)}
        )
