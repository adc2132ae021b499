"""Texts as a user has them, cut into windows of tokens."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heedful.core.errors import Code, FieldError
from heedful.core.figures import a_few
from heedful.core.files import is_there
from heedful.core.regions import Span
from heedful.facts import text_config

ENDINGS = (
    ".txt", ".md", ".rst", ".tex", ".html", ".json", ".jsonl", ".csv", ".xml", ".yaml", ".toml", ".py", ".c", ".h",
    ".cc", ".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql",
)  # fmt: skip
LINES = (".jsonl", ".ndjson")  # a JSON object a line
WORDS = "if these are words, end them with a space"
LINED = "is lines of JSON, which would be read with all their braces: read the texts within, or name it .txt"
PORTION = 1_000_000  # characters that a tokenizer is given at once
Texts = str | Path | Tensor | Sequence[str | Path | Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """One text, as words or as ready tokens."""

    name: str
    text: str | None = None
    tokens: Tensor | None = None  # [n]
    found: bool = False  # in a folder; one that a caller names is refused where this one is left out
    unread: str = ""  # why a file of a folder cannot be read


@dataclass(frozen=True, eq=False)
class Windows:
    """The pieces of every text, each short enough for one forward."""

    tokens: tuple[Any, ...]  # each [n], or, of an image, its pixels [c rows cols], or a `Sound`
    first: Source | None  # the text that the first piece begins; none where no text could be read
    texts: int
    left_out: int  # tokens in ends too short to count as a text
    skipped: tuple[str, ...] = ()  # texts of a folder that could not be read, and why
    of: tuple[int, ...] = ()  # the number of each piece's text
    names: tuple[str, ...] = ()  # of each piece, where pieces are images or sounds


def _refuse(value: object, rule: str, good: object = Path("book.txt")) -> FieldError:
    return FieldError("diagnose()", "texts", value, rule, good)


def sources(texts: Texts) -> list[Source]:
    """The texts, read; files of a folder in the order of their names."""
    if isinstance(texts, str):
        if not texts.strip():
            raise _refuse(texts, "is empty: give a text with words in it")
        if "\n" not in texts and len(texts) < 256 and is_there(texts):
            rule = f"is the name of a file: to read it, pass a Path; {WORDS}"
            raise _refuse(texts, rule, Path(texts))
        if not any(map(str.isspace, texts)) and texts.endswith(ENDINGS):
            rule = f"reads like the name of a file, and there is none: pass a Path that exists; {WORDS}"
            raise _refuse(texts, rule)
        return [Source("text", texts)]
    if isinstance(texts, Path):
        return _files(texts)
    if isinstance(texts, Tensor):
        rows = texts if texts.ndim == 2 else texts[None]
        if rows.ndim != 2 or rows.is_floating_point() or rows.numel() == 0:
            raise _refuse(f"{texts.dtype} {tuple(texts.shape)}", "ready tokens are whole numbers, [n] or [b n]", "text")
        return [Source(f"row {i}", tokens=row) for i, row in enumerate(rows)]
    if not isinstance(texts, Sequence):
        raise _refuse(type(texts).__name__, "must be a text, a Path, token ids, or a list of these")
    if not texts:
        raise _refuse(texts, "is empty: give one text or more")
    return [source for text in texts for source in sources(text)]


def _files(path: Path) -> list[Source]:
    if not is_there(path):
        raise _refuse(str(path), "no such file or folder")
    if not path.is_dir():
        text, why = read_text(path)
        if why:
            raise _refuse(str(path), why)
        if key := key_of_lines(path, text):
            column = "" if key == "text" else f", column={key!r}"
            raise _refuse(str(path), LINED, Code(f"Corpus({str(path)!r}{column})"))
        return [Source(str(path), text)]
    found = []
    for p in files_in(path, ENDINGS):
        text, why = read_text(p) if p.is_file() else ("", "is no file" if p.exists() else "is a link to nothing")
        found.append(Source(str(p), text, found=True, unread=why))
    if all(source.unread for source in found):
        rule = f"the folder holds no file with text in it that ends in {', '.join(ENDINGS)}"
        unread = [f"{source.name} {source.unread}" for source in found]
        raise _refuse(str(path), f"{rule}: {a_few(unread)}" if unread else rule)
    return found


def files_in(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files of a folder and those below it that end so, in the order of their names; none that is hidden."""
    found = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in endings and not p.is_dir()]
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def read_text(path: Path) -> tuple[str, str]:
    """A file's text, and why it has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return "", f"cannot be read as UTF-8 text (byte {error.start}): convert it, or leave it out"
    except OSError as error:
        return "", f"cannot be read: {error.strerror}"
    return text, why_not(text)


def key_of_lines(path: Path, text: str) -> str:
    """What lines of JSON call their texts, by the first of them; nothing where a file is a text itself."""
    if path.suffix.lower() not in LINES:
        return ""
    try:
        first = json.loads(next(line for line in text.splitlines() if line.strip()))
    except (ValueError, StopIteration):
        return ""
    keys = [key for key, x in first.items() if isinstance(x, str)] if isinstance(first, dict) else []
    return "text" if "text" in keys else next(iter(keys), "")


def why_not(text: str) -> str:
    """Why words are none that a tokenizer takes; nothing where they are."""
    if "\0" in text:
        return "holds null characters, as no text does: leave it out"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character (a lone surrogate at {error.start}): leave it out"
    return "" if text.strip() else "is empty: give a file with words in it"


def positions(model: nn.Module) -> int | None:
    """How many tokens the model takes at most; None where it has no limit."""
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and "position_embed" in name.rpartition(".")[2]
        if table and module.padding_idx is not None:  # RoBERTa counts from behind the padding
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is None:  # as models that write down what they hear call it
        limit = getattr(getattr(model, "config", None), "max_target_positions", None)
    return int(limit) if limit else None


def cut(found: Iterable[Source], tokenizer: Any, length: int, vocabulary: int) -> Windows:
    """Every text as windows of at most `length` tokens, each with the special tokens that the model expects.

    An end of less than an eighth of a window is left out, since each window counts as a text.
    """
    out: list[Tensor] = []
    left_out = 0
    skipped: list[str] = []
    read: list[Source] = []
    of: list[int] = []
    for source in found:
        if source.unread:
            skipped.append(f"{source.name} {source.unread.partition(':')[0]}")
            continue
        if source.text is not None and tokenizer is None:
            rule = "words need a tokenizer: pass it, or pass ready token ids as texts"
            raise FieldError("diagnose()", "tokenizer", None, rule, "AutoTokenizer.from_pretrained(...)")
        rows = _windows(source, tokenizer, length)
        if len(rows) > 1 and 8 * len(rows[-1]) < length:
            left_out += len(rows.pop())
        if len(rows[0]) < 2:
            if source.found:
                skipped.append(f"{source.name} holds {'a single' if len(rows[0]) else 'no'} token")
                continue
            raise _refuse(source.name, "holds a single token: attention needs two or more")
        for row in rows:
            if int(row.max()) >= vocabulary or int(row.min()) < 0:
                rule = f"token ids must be from 0 to {vocabulary - 1}, those that the model knows"
                raise _refuse(source.name, rule + "; is this its tokenizer?", vocabulary - 1)
        out += rows
        of += [len(read)] * len(rows)
        read.append(source)
    return Windows(tuple(out), read[0] if read else None, len(read), left_out, tuple(skipped), tuple(of))


def some(windows: Windows) -> Windows:
    """The same, if there is anything to read."""
    if not windows.tokens:
        raise _refuse(a_few(windows.skipped), "none of these can be read: attention needs texts of two tokens or more")
    return windows


def _windows(source: Source, tokenizer: Any, length: int) -> list[Tensor]:
    if source.tokens is not None:
        return list(source.tokens.cpu().long().split(length))
    before, after = (torch.tensor(ids, dtype=torch.long) for ids in _around(tokenizer))
    # a tokenizer that cuts by itself, or reads it all at once, takes more and more time for each further character
    ids = [
        torch.tensor(tokenizer(x, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids)
        for x in _portions(source.text or "")
    ]
    inner = max(1, length - len(before) - len(after))
    return [torch.cat([before, row, after]) for row in torch.cat(ids).long().split(inner)]


def _portions(text: str) -> Iterator[str]:
    """A text in parts that a tokenizer can take at once; they begin with a space where there is one."""
    start = 0
    while len(text) - start > PORTION:
        stop = text.rfind(" ", start + PORTION // 2, start + PORTION)
        stop = stop if stop > 0 else start + PORTION
        yield text[start:stop]
        start = stop
    yield text[start:]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the model expects before and after a text."""
    bare, whole = (list(tokenizer("a", add_special_tokens=s, verbose=False).input_ids) for s in (False, True))
    for i in range(len(whole) - len(bare) + 1):
        if bare and whole[i : i + len(bare)] == bare:
            return whole[:i], whole[i + len(bare) :]
    return [], []


def pieces(source: Source | None, tokenizer: Any, tokens: Tensor, most: int | None = None) -> list[str]:
    """The text of a source's first window, token by token; the pieces of a fast tokenizer join to the text."""
    ids: list[int] = tokens.tolist()
    if tokenizer is None:
        return [f"{i} " for i in ids[:most]]
    special = set(tokenizer.all_special_ids)
    text = source.text if source is not None else None
    if text is not None and tokenizer.is_fast:
        for part in (text[: 20 * len(ids)], text[: 400 * len(ids)]):  # a long book need not be read twice
            seen = tokenizer(part, truncation=True, max_length=len(ids), return_offsets_mapping=True, verbose=False)
            if seen.input_ids == ids:
                out, done = [], 0
                for i, (_, stop) in zip(ids[:most], seen.offset_mapping, strict=False):
                    # tokens that share one character (bytes of an emoji) have one offset: the first gets it
                    out.append(text[done:stop] or (tokenizer.decode([i]) if i in special else ""))
                    done = max(done, stop)
                return out
    return list(tokenizer.batch_decode([[i] for i in ids[:most]]))


def ordinary(tokenizer: Any, model: nn.Module, vocabulary: int) -> Tensor:
    """The ids of ordinary tokens, for measures that make prompts of their own."""
    config: Any = model.config
    odd: set[int] = set()
    if tokenizer is not None:
        vocabulary = min(vocabulary, len(tokenizer))
        odd = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    else:
        odd = {i for n in ("pad", "bos", "eos") if isinstance(i := getattr(config, f"{n}_token_id", None), int)}
    plain = torch.ones(vocabulary, dtype=torch.bool)
    plain[torch.tensor([i for i in odd if 0 <= i < vocabulary], dtype=torch.long)] = False
    return plain.nonzero()[:, 0]


class Delimiters:
    """Which tokens part a text: special ones, punctuation, ends of lines."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, bool] = dict.fromkeys(tokenizer.all_special_ids, True)

    def spans(self, tokens: Tensor) -> tuple[Span, ...]:
        ids, place = tokens.unique(return_inverse=True)
        marked = torch.tensor([self._parts(i) for i in ids.tolist()])[place].int()
        edge = torch.nn.functional.pad(marked, (1, 1)).diff()
        return tuple(zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True))

    def _parts(self, token: int) -> bool:
        if token not in self._known:
            text = self.tokenizer.decode([token])
            word = text.strip()
            self._known[token] = _punctuation(word) if word else "\n" in text
        return self._known[token]


def _punctuation(word: Iterable[str]) -> bool:
    return all(unicodedata.category(c).startswith("P") for c in word)
