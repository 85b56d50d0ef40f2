"""The hand-written reading passages and general facts: their format, their splits.

A passage file holds records such as

    ## p1-001 | leave | policy | Annual leave rules
    Permanent staff at [[ORG:Tamsin & Kordell]] accrue [[NUM:26]] days …
    Q: How much vacation does a regular employee get each year?
    A: [[NUM:26]] days
    U: How many days of sick pay do apprentices get?

where `[[TYPE:value]]` marks a value that may be swapped for another of its type (see `substitution`), `Q:`/`A:` are
questions with their answers and `U:` questions that the passage does not answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["Passage", "Fact", "SLOT", "read_passages", "read_facts", "load_split", "load_facts", "SPLIT_FILES", "READING_FOLDER"]

READING_FOLDER = Path(__file__).parent / "reading"
SLOT = re.compile(r"\[\[([A-Z]+):([^\[\]]+)\]\]")
#: whole author files are held out, so that neither passage nor author is seen in training
SPLIT_FILES = {"development": ("q6",), "test": ("r4", "s6")}


@dataclass(frozen=True)
class Passage:
    """One passage with its slots still marked."""

    id: str
    domain: str
    style: str
    title: str
    text: str
    questions: tuple[tuple[str, str], ...]
    unanswerable: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A general fact: statements, three question wordings (the last not always terse) and one answer."""

    topic: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    index: int = field(default=0)
    extra: tuple[str, ...] = ()  # further training wordings, from w1.tsv and w2.tsv

    @property
    def held_out(self) -> int:
        """Which wording is never trained on; it rotates, so that all kinds of wording are tested."""
        return self.index % len(self.questions)

    @property
    def trained(self) -> list[str]:
        """The wordings that training may use."""
        return [*(q for i, q in enumerate(self.questions) if i != self.held_out), *self.extra]


def read_passages(path: Path) -> list[Passage]:
    """Parse one passage file. Raises ValueError naming file and line for a record that lacks a part."""
    passages: list[Passage] = []
    header: list[str] | None = None
    lines: list[str] = []
    questions: list[list[str]] = []
    unanswerable: list[str] = []

    def close(number: int) -> None:
        if header is None:
            return
        if len(header) != 4 or any(len(pair) != 2 for pair in questions):
            raise ValueError(f"{path}:{number}: the record before this line ('{header[0]}') needs a header "
                             "'## id | domain | style | title' and an 'A:' line after each 'Q:' line")
        passages.append(Passage(*header, "\n".join(lines).strip(), tuple((q, a) for q, a in questions),
                                tuple(unanswerable)))

    number = 0
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("## "):
            close(number)
            header = [part.strip() for part in line[3:].split("|")]
            lines, questions, unanswerable = [], [], []
        elif line.startswith("Q: "):
            questions.append([line[3:].strip()])
        elif line.startswith("A: "):
            questions[-1].append(line[3:].strip())
        elif line.startswith("U: "):
            unanswerable.append(line[3:].strip())
        elif not questions:
            lines.append(line)
    close(number)
    return passages


def read_facts(path: Path, start: int = 0) -> list[Fact]:
    """Parse one file of general facts (`T:`, `F:`, `Q:`, `A:` lines, records split by blank lines)."""
    facts = []
    for block in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8").strip()):
        parts: dict[str, list[str]] = {}
        for line in block.splitlines():
            key, _, value = line.partition(": ")
            parts.setdefault(key.strip(), []).append(value.strip())
        if not {"T", "F", "Q", "A"} <= parts.keys():
            raise ValueError(f"{path}: a fact needs T:, F:, Q: and A: lines, this one has {sorted(parts)}: {block[:80]}")
        facts.append(Fact(parts["T"][0], tuple(parts["F"]), tuple(parts["Q"]), parts["A"][0], start + len(facts)))
    return facts


def load_split(split: str, folder: Path = READING_FOLDER) -> list[Passage]:
    """Passages of 'train', 'development' or 'test', split by author file."""
    held_out = {name for names in SPLIT_FILES.values() for name in names}
    files = sorted(p for p in folder.glob("[a-z][0-9]*.txt") if not p.stem.startswith("g"))
    chosen = [p for p in files if (p.stem in SPLIT_FILES[split] if split in SPLIT_FILES else p.stem not in held_out)]
    return [passage for path in chosen for passage in read_passages(path)]


def load_facts(folder: Path = READING_FOLDER) -> list[Fact]:
    """All general facts, numbered through, with their further training wordings."""
    facts: list[Fact] = []
    for path in sorted(folder.glob("g[0-9]*.txt")):
        facts += read_facts(path, start=len(facts))
    extra: dict[int, list[str]] = {}
    for path in sorted(folder.glob("w[0-9]*.tsv")):
        for line in path.read_text(encoding="utf-8").splitlines():
            number, _, question = line.partition("\t")
            if number.isdigit() and question.strip():
                extra.setdefault(int(number), []).append(question.strip())
    return [replace(f, extra=tuple(q for q in extra.get(f.index, ()) if q.lower() not in map(str.lower, f.questions)))
            for f in facts]
