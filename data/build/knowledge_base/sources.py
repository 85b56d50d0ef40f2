"""Read and check what the writers wrote: documents, facts, changes, questions, injections and tickets.

Every reader appends what it finds wrong to one list of problems, with file and line, and goes on.
"""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

__all__ = ["AREAS", "SNAPSHOTS", "Change", "Document", "Fact", "Injection", "Problem", "Question", "Sources", "Ticket",
           "read_sources", "runs", "words"]

AREAS = ("hr", "pr", "it", "sa", "co", "mf")
SNAPSHOTS = ("2026-04-01", "2026-10-01")
ACCESS_GROUPS = ("everyone", "people", "finance", "engineering", "sales", "leadership")
TEAMS = ("People", "Finance", "Legal", "Product", "Motion Control", "Perception", "Fleet Software", "Platform",
         "Security", "Quality", "Factory", "Logistics", "Service", "Sales", "Training Centre", "Communications")
FORMATS = ("md", "html", "pdf", "docx", "csv")
CHANNELS = ("email", "phone", "portal", "chat", "walk-in")
_REQUIRED = ("id", "title", "department", "access_group", "effective_date", "format", "snapshots", "author")
_SHOWN = 90  # characters of a wrong line that a message shows


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong in a source file."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Document:
    """A document as written. `body_line` is the line of the file on which the body starts."""

    id: str
    title: str
    department: str
    access_group: str
    effective_date: datetime.date
    format: str
    snapshots: tuple[int, ...]
    author: str
    supersedes: str
    body: str
    file: str
    body_line: int


@dataclass(frozen=True)
class Change:
    """One piece of a document that reads differently in the second snapshot."""

    document: str
    date: datetime.date
    old: str
    new: str
    file: str
    line: int


@dataclass(frozen=True)
class Question:
    """A wording of a fact's question, or (fact and wording empty) an unanswerable question."""

    text: str
    file: str
    line: int
    fact: str = ""
    wording: int = 0
    document: str = ""


@dataclass
class Fact:
    """A fact as written; `old` is (value, document, evidence) of an older document that says otherwise."""

    id: str
    entity: str
    attribute: str
    value: str
    document: str
    file: str
    line: int
    evidence: str = ""
    new_value: str = ""
    old: tuple[str, str, str] | None = None
    also: tuple[str, ...] = ()
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Injection:
    """A sentence aimed at machines that read a document, and the words that an obeying one would write."""

    document: str
    sentence: str
    marker: str
    file: str
    line: int


@dataclass(frozen=True)
class Ticket:
    """A service ticket with its triage code."""

    code: str
    channel: str
    text: str
    file: str
    line: int


@dataclass
class Sources:
    """Everything that was written, and everything that is wrong with it."""

    documents: dict[str, Document] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    unanswerable: list[Question] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, file: str, line: int, message: str) -> None:
        self.problems.append(Problem(file, line, message))

    def questions(self) -> Iterator[Question]:
        for fact in self.facts:
            yield from fact.questions


def words(text: str) -> list[str]:
    """Lower-cased words of a text."""
    return re.findall(r"\w+", text.lower())


def read_sources(folder: Path) -> Sources:
    """Read all source files below a folder. Problems are collected, not raised."""
    sources = Sources()
    for path in sorted((folder / "docs").glob("*.md")):
        _read_document(path, f"docs/{path.name}", sources)
    _check_documents(sources)
    for area in AREAS:
        _read_facts(folder, area, sources)
        _read_changes(folder, area, sources)
        for number, (document, text) in _table(folder, f"unanswerable/{area}.txt", 2, sources):
            sources.unanswerable.append(Question(text, f"unanswerable/{area}.txt", number, document=document))
        for number, row in _table(folder, f"facts/{area}-injections.txt", 3, sources):
            sources.injections.append(Injection(*row, f"facts/{area}-injections.txt", number))
    for path in sorted(folder.glob("tickets-*.tsv")):
        for number, row in _table(folder, path.name, 3, sources, separator="\t"):
            sources.tickets.append(Ticket(*row, path.name, number))
    _check_references(sources)
    _check_questions(sources)
    _check_tickets(sources)
    return sources


# ------------------------------------------------------------------------------------------------------------ documents

def _read_document(path: Path, name: str, sources: Sources) -> None:
    text = path.read_text(encoding="utf-8")
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if not match:
        return sources.wrong(name, 1, "no front matter between two lines of '---'")
    try:
        front = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError) as error:
        return sources.wrong(name, 1, f"front matter is no YAML: {' '.join(str(error).split())}")
    if lacking := [key for key in _REQUIRED if not front.get(key)]:
        return sources.wrong(name, 1, f"front matter lacks {', '.join(lacking)}")
    if not isinstance(front["effective_date"], datetime.date) or not isinstance(front["snapshots"], list):
        return sources.wrong(name, 1, "effective_date must be a date YYYY-MM-DD and snapshots a list such as [1, 2]")
    body = text[match.end():].strip("\n") + "\n"
    skipped = len(text[match.end():]) - len(text[match.end():].lstrip("\n"))
    sources.documents[path.stem] = Document(
        id=str(front["id"]), title=str(front["title"]).strip(), department=str(front["department"]),
        access_group=str(front["access_group"]), effective_date=front["effective_date"], format=str(front["format"]),
        snapshots=tuple(front["snapshots"]), author=str(front["author"]), supersedes=str(front.get("supersedes") or ""),
        body=body, file=name, body_line=text[:match.end()].count("\n") + 1 + skipped)


def _check_documents(sources: Sources) -> None:
    titles: dict[str, str] = {}
    first, second = (datetime.date.fromisoformat(s) for s in SNAPSHOTS)
    for name, d in sources.documents.items():
        for allowed, what, value in (
                (ACCESS_GROUPS, "access_group", d.access_group), (TEAMS, "department", d.department),
                (FORMATS, "format", d.format), (((1, 2), (1,), (2,)), "snapshots", d.snapshots)):
            if value not in allowed:
                sources.wrong(d.file, 1, f"{what} is {value!r}; expected one of {', '.join(map(str, allowed))}")
        if d.id != name or d.id.split("-")[0] not in AREAS:
            sources.wrong(d.file, 1, f"id is '{d.id}'; expected the file's name, which starts with an area")
        if 1 in d.snapshots and d.effective_date >= first:
            sources.wrong(d.file, 1, f"effective_date {d.effective_date} is not before {first}")
        if d.snapshots == (2,) and not first < d.effective_date < second:
            sources.wrong(d.file, 1, f"a new document's effective_date {d.effective_date} is not between the snapshots")
        if d.title in titles:
            sources.wrong(d.file, 1, f"title is also that of {titles[d.title]}")
        titles[d.title] = d.file
        if d.supersedes:
            older = sources.documents.get(d.supersedes)
            if older is None:
                sources.wrong(d.file, 1, f"supersedes '{d.supersedes}', which does not exist")
            elif older.effective_date >= d.effective_date:
                sources.wrong(d.file, 1, f"supersedes {d.supersedes}, which is not older")
        if d.format == "csv":
            rows = list(csv.reader(d.body.splitlines()))
            for number, row in enumerate(rows, d.body_line):
                if len(row) != len(rows[0]):
                    sources.wrong(d.file, number, f"row has {len(row)} cells, the header {len(rows[0])}")


# ----------------------------------------------------------------------------------------- facts, changes, small tables

def _table(folder: Path, name: str, columns: int, sources: Sources,
           separator: str = "|") -> Iterator[tuple[int, list[str]]]:
    path = folder / name
    if not path.exists():
        return sources.wrong(name, 1, "the file is missing")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            row = [cell.strip() for cell in line.split(separator)]
            if len(row) == columns and all(row):
                yield number, row
            else:
                sources.wrong(name, number, f"expected {columns} filled columns, got {len(row)}: {line[:_SHOWN]}")


def _read_facts(folder: Path, area: str, sources: Sources) -> None:
    name = f"facts/{area}.txt"
    if not (folder / name).exists():
        return sources.wrong(name, 1, "the file is missing")
    fact: Fact | None = None
    count = 0
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        mark, _, rest = line.partition(": ")
        rest = rest.strip()
        if not line.strip() or line.startswith("#"):
            continue
        if mark == "F":
            count += 1
            parts = [p.strip() for p in rest.split("|")]
            if len(parts) != 4 or not all(parts):
                sources.wrong(name, number,
                              f"expected 'F: entity | attribute | value | document', got: {line[:_SHOWN]}")
                fact = None
                continue
            fact = Fact(f"{area}-{count:03d}", *parts, file=name, line=number)
            sources.facts.append(fact)
        elif fact is None:
            sources.wrong(name, number, f"this line belongs to no fact: {line[:_SHOWN]}")
        elif mark == "E":
            fact.evidence = rest
        elif mark == "N":
            fact.new_value = rest
        elif mark == "O":
            parts = [p.strip() for p in rest.split("|", 2)]
            if len(parts) == 3:
                fact.old = tuple(parts)
            else:
                sources.wrong(name, number, f"expected 'O: value | document | piece', got: {line[:_SHOWN]}")
        elif mark == "ALSO":
            fact.also = tuple(p.strip() for p in rest.split(";") if p.strip())
        elif re.fullmatch("[1-6]", mark) and rest:
            fact.questions.append(Question(rest, name, number, fact.id, int(mark)))
        else:
            sources.wrong(name, number,
                          f"a line starts with F, E, N, O, ALSO or 1 to 6 and ': ', got: {line[:_SHOWN]}")


def _read_changes(folder: Path, area: str, sources: Sources) -> None:
    name = f"changes/{area}.txt"
    if not (folder / name).exists():
        return sources.wrong(name, 1, "the file is missing")
    document, date, old = "", None, None
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        if match := re.fullmatch(r"@ (\S+) (\d{4}-\d\d-\d\d)\s*", line):
            document, date = match.group(1), datetime.date.fromisoformat(match.group(2))
            if not SNAPSHOTS[0] < match.group(2) < SNAPSHOTS[1]:
                sources.wrong(name, number, f"{match.group(2)} is not between the snapshots")
        elif line.startswith("- ") and document and old is None:
            old = line[2:]
        elif line.startswith("+ ") and document and old is not None:
            sources.changes.append(Change(document, date, old, line[2:], name, number))
            old = None
        elif line.strip():
            sources.wrong(name, number,
                          f"expected '@ document date', then pairs of '- old' and '+ new', got: {line[:_SHOWN]}")


# ----------------------------------------------------------------------------------------------------- across the files

def _line_with(body: str, piece: str) -> bool:
    return bool(piece) and any(piece in line for line in body.splitlines())


def _check_references(sources: Sources) -> None:
    documents = sources.documents
    seen: dict[tuple[str, str], Fact] = {}
    for fact in sources.facts:
        key = (fact.entity.lower(), fact.attribute.lower())
        if key in seen:
            sources.wrong(fact.file, fact.line, f"entity and attribute are also those of {seen[key].id}")
        seen[key] = fact
        document = documents.get(fact.document)
        if document is None:
            sources.wrong(fact.file, fact.line, f"there is no document '{fact.document}'")
            continue
        if not _line_with(document.body, fact.evidence):
            sources.wrong(fact.file, fact.line,
                          f"evidence is not a piece of a line of {fact.document}: {fact.evidence[:_SHOWN]}")
        if fact.value not in fact.evidence:
            sources.wrong(fact.file, fact.line, f"value '{fact.value}' does not stand in the evidence")
        if [q.wording for q in fact.questions] != [1, 2, 3, 4, 5, 6]:
            sources.wrong(fact.file, fact.line, f"expected questions 1 to 6, got {[q.wording for q in fact.questions]}")
        if fact.new_value and document.snapshots != (1, 2):
            sources.wrong(fact.file, fact.line, f"has a new value, but {fact.document} is not in both snapshots")
        if fact.old:
            value, older_id, piece = fact.old
            older = documents.get(older_id)
            if older is None or not _line_with(older.body, piece):
                sources.wrong(fact.file, fact.line,
                              f"old evidence is not a piece of a line of {older_id}: {piece[:_SHOWN]}")
            elif value not in piece:
                sources.wrong(fact.file, fact.line, f"old value '{value}' does not stand in the old evidence")
            elif not set(document.snapshots) <= set(older.snapshots):
                sources.wrong(fact.file, fact.line, f"{older_id} is not in every snapshot that {fact.document} is in")
            elif (document.effective_date - older.effective_date).days < 270:
                sources.wrong(fact.file, fact.line, f"{older_id} is less than nine months older than {fact.document}")
            elif document.supersedes != older_id:
                sources.wrong(fact.file, fact.line, f"{fact.document} does not say that it supersedes {older_id}")
            if value == fact.value or value == fact.new_value:
                sources.wrong(fact.file, fact.line, "old and present value are the same")
    for change in sources.changes:
        document = documents.get(change.document)
        if document is None or document.snapshots != (1, 2):
            sources.wrong(change.file, change.line, f"there is no document '{change.document}' in both snapshots")
        elif document.body.count(change.old) != 1:
            times = document.body.count(change.old)
            sources.wrong(change.file, change.line, f"the piece stands {times} times in {change.document}, not once")
    for question in sources.unanswerable:
        if question.document not in documents:
            sources.wrong(question.file, question.line, f"there is no document '{question.document}'")
    for i in sources.injections:
        document = documents.get(i.document)
        if document is None:
            sources.wrong(i.file, i.line, f"there is no document '{i.document}'")
        elif i.sentence not in document.body and document.format != "html":
            sources.wrong(i.file, i.line, f"the sentence does not stand in {i.document}")
        if i.marker not in i.sentence:
            sources.wrong(i.file, i.line, f"the marker '{i.marker}' does not stand in the sentence")


def _check_questions(sources: Sources) -> None:
    """No question twice; no run of five words in a training question and in a held-out or unanswerable one."""
    seen: dict[str, Question] = {}
    for question in [*sources.questions(), *sources.unanswerable]:
        key = " ".join(words(question.text))
        if key in seen:
            sources.wrong(question.file, question.line,
                          f"the same question stands in {seen[key].file}:{seen[key].line}")
        seen.setdefault(key, question)
    trained: dict[tuple[str, ...], Question] = {}
    for question in sources.questions():
        if question.wording <= 3:
            for run in runs(question.text):
                trained.setdefault(run, question)
    for question in [*sources.questions(), *sources.unanswerable]:
        shared = [] if 1 <= question.wording <= 3 else [run for run in runs(question.text) if run in trained]
        if shared:
            other = trained[shared[0]]
            sources.wrong(question.file, question.line, f"question shares '{' '.join(shared[0])}' with the "
                                                        f"training question in {other.file}:{other.line}")


def runs(text: str, length: int = 5) -> list[tuple[str, ...]]:
    """All runs of `length` words in a text."""
    tokens = words(text)
    return [tuple(tokens[i:i + length]) for i in range(len(tokens) - length + 1)]


def _check_tickets(sources: Sources) -> None:
    seen: dict[str, Ticket] = {}
    for ticket in sources.tickets:
        if ticket.channel not in CHANNELS:
            sources.wrong(ticket.file, ticket.line,
                          f"channel is '{ticket.channel}'; expected one of {', '.join(CHANNELS)}")
        key = " ".join(words(ticket.text))
        if key in seen:
            sources.wrong(ticket.file, ticket.line, f"the same ticket stands in {seen[key].file}:{seen[key].line}")
        seen.setdefault(key, ticket)
