"""Where a method comes from, and what we do unlike its authors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from heedful.core.errors import FieldError


@dataclass(frozen=True)
class Paper:
    """A citation: `key` is its arXiv number or its id in heedful's list, `differs` one sentence for each deviation.

    `also` names other papers whose formula it is as well, each with what is unlike that one.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str = ""
    venue: str = ""
    url: str = ""
    differs: tuple[str, ...] = ()
    also: tuple[Paper, ...] = ()

    def __post_init__(self) -> None:
        if not self.title:
            raise FieldError(self, "title", self.title, "must not be empty", "Attention Is All You Need")
        if not 1990 <= self.year <= 2100:
            raise FieldError(self, "year", self.year, "must be a year from 1990 to 2100", 2024)
        if isinstance(self.differs, str):
            raise FieldError(self, "differs", self.differs, "must be a tuple of sentences", ("one sentence",))
        if not isinstance(self.also, tuple) or any(not isinstance(other, Paper) or other.also for other in self.also):
            good = (replace(self, also=()),)
            raise FieldError(self, "also", self.also, "must be a tuple of papers that name no others", good)

    @property
    def every(self) -> tuple[Paper, ...]:
        """It, and the others whose formula it is."""
        return (self, *self.also)

    @property
    def claim(self) -> str:
        """The name of its claim's file, which Python can import: A2404_14469 for 2404.14469."""
        return self.key if self.key.isidentifier() else "A" + re.sub(r"\W", "_", self.key)

    @property
    def link(self) -> str:
        return self.url or (f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else "")

    @property
    def appeared(self) -> str:
        """Where and when: `ICCV 2025`, or `arXiv, 2025`."""
        where = self.venue or "arXiv"
        return where if str(self.year) in where else f"{where}, {self.year}"

    def bibtex(self) -> str:
        """A BibTeX entry; its key is the first author's last word, the year and the title's first word."""
        first = self.authors.split(",")[0].split(" and ")[0].split()
        stem = "".join(c for c in (first[-1] if first else "anon") if c.isalnum()).lower()
        word = "".join(c for c in self.title.split()[0] if c.isalnum()).lower()
        rows = {
            "title": "{" + self.title + "}",
            "author": self.authors.replace(", ", " and "),
            "year": str(self.year),
            "journal": self.venue or (f"arXiv:{self.arxiv}" if self.arxiv else ""),
            "eprint": self.arxiv,
            "url": self.link,
        }
        body = ",\n".join(f"  {name} = {{{text}}}" for name, text in rows.items() if text)
        return f"@article{{{stem}{self.year}{word},\n{body}\n}}"


UNPUBLISHED = Paper("", "Unpublished", "", 2026)  # of what only serves another method, and of plain functions
