"""Build `data/knowledge_base` and `data/questions` from what the writers wrote.

Run from the repository's root: ``python -m data.build.knowledge_base.build``. The result is the same byte for
byte in every run. If anything is wrong with the sources, all problems are listed with file and line, and nothing is
written.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bs4 import BeautifulSoup

from utils.corpus import load_folder

from .render import plain, render
from .sources import AREAS, SNAPSHOTS, Change, Document, Fact, Problem, Sources, read_sources

__all__ = ["FEW_SHARED", "SEED", "SourceError", "build", "card_counts", "few_shared_words", "main", "shared_words",
           "stem"]

SOURCE = Path(__file__).resolve().parent
TARGET = SOURCE.parent.parent
SEED = "brindlemark-1"
FEW_SHARED = 0.25  # a question shares few words with its passage if it shares a smaller part than this
TRAIN_TICKETS = 600
CARD_START, CARD_END = "<!-- counts: written by data/build/knowledge_base/build.py -->", "<!-- end of counts -->"
CATALOGUE = ("id", "file", "title", "department", "access_group", "effective_date", "supersedes", "author", "format")
AREA_NAMES = {"hr": "people and pay", "pr": "products", "it": "IT and security", "sa": "sales and service",
              "co": "the company", "mf": "manufacturing"}

_STOP = frozenset(re.findall(r"\w+", """
a about after all am an and any are as at be because been before being between both but by can could did do does
doing down during each else ever every few for from further get gets give given go goes had has have having he her
here hers him his how i if in into is it its itself just let like long many may me might more most much must my name
need no nor not now of off on once one only or other our out over own per please s same shall she should so some
such t than that the their them then there these they this those through to too under until up us use very was we
were what when where whether which while who whom whose why will with would you your
"""))


class SourceError(ValueError):
    """The sources are wrong; `problems` says where and how."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = sorted(set(problems))
        super().__init__("\n".join([f"{len(self.problems)} problems in {SOURCE.name}/, nothing was written:",
                                    *map(str, self.problems)]))


# ------------------------------------------------------------------------------------------------------------ snapshots

def snapshot_documents(sources: Sources, number: int) -> dict[str, Document]:
    """The documents of snapshot 1 or 2, changes applied, by id."""
    found = {}
    for document in sources.documents.values():
        if number not in document.snapshots:
            continue
        changes = [c for c in sources.changes if c.document == document.id] if number == 2 else []
        if changes:
            document = dataclasses.replace(document, body=_changed(document.body, changes)[0],
                                           effective_date=changes[0].date)
        found[document.id] = document
    return found


def _changed(body: str, changes: Sequence[Change]) -> tuple[str, list[tuple[int, int, int]]]:
    """The new body, and for each change where it started and ended in the old body and by how much it is longer."""
    edits = []
    for change in changes:
        start = body.index(change.old)
        same = len(os.path.commonprefix([change.old, change.new]))
        tail = len(os.path.commonprefix([change.old[same:][::-1], change.new[same:][::-1]]))
        edits.append((start + same, start + len(change.old) - tail, change.new[same:len(change.new) - tail]))
    edits.sort()
    parts, position = [], 0
    for start, end, text in edits:
        parts += [body[position:start], text]
        position = end
    return "".join(parts) + body[position:], [(s, e, len(text) - (e - s)) for s, e, text in edits]


def _new_evidence(old_body: str, evidence: str, changes: Sequence[Change]) -> tuple[str, bool]:
    """Where the evidence stands in the changed body, and whether a change touched it."""
    body, edits = _changed(old_body, changes)
    start = old_body.index(evidence)
    end = start + len(evidence)
    touched = [(s, e, d) for s, e, d in edits if s <= end and e >= start]
    start = min([start, *(s for s, _, _ in touched)])
    end = max([end, *(e for _, e, _ in touched)])
    while touched and start > 0 and old_body[start - 1].isalnum():  # no half words
        start -= 1
    while touched and end < len(old_body) and old_body[end].isalnum():
        end += 1
    before = sum(d for s, _, d in edits if s < start and (s, _, d) not in touched)
    return body[start + before:end + before + sum(d for *_, d in touched)].strip("\n"), bool(touched)


# ----------------------------------------------------------------------------------------- evidence as a reader sees it

def squeeze(text: str) -> str:
    """Only letters and digits, in small letters."""
    return re.sub(r"[\W_]+", "", text.lower())


def _cells(document: Document, evidence: str) -> list[str] | None:
    """The cells of the table row that the evidence is, or None where it is running text."""
    if document.format == "csv":
        line = next(line for line in document.body.splitlines() if evidence in line)
        return next(csv.reader([line]))
    if document.format == "html" and "<td" in evidence:
        return [cell.get_text(" ") for cell in BeautifulSoup(evidence, "html.parser").find_all(["td", "th"])]
    if document.format == "docx" and evidence.lstrip().startswith("|"):
        return [plain(cell) for cell in evidence.strip().strip("|").split("|")]
    return None


def extracted_evidence(document: Document, evidence: str, text: str) -> str | None:
    """The evidence as it stands in the extracted text of the document; None where it does not."""
    if cells := _cells(document, evidence):
        parts = [squeeze(cell) for cell in cells if squeeze(cell)]
        pattern = re.compile(".*".join(map(re.escape, parts)))
        return next((line.strip() for line in text.splitlines() if pattern.search(squeeze(line))), None)
    if document.format == "html":
        evidence = BeautifulSoup(evidence, "html.parser").get_text()
    elif document.format in ("pdf", "docx"):
        evidence = plain(evidence.strip().strip("|").replace("|", " "))
        evidence = re.sub(r"^(#+|[-*])\s+", "", evidence)
    evidence = " ".join(evidence.split())
    return evidence if squeeze(evidence) in squeeze(text) else None


def _passage(text: str, evidence: str) -> str:
    """The paragraph or row that holds the evidence."""
    wanted = squeeze(evidence)
    for piece in [*text.splitlines(), *text.split("\n\n")]:
        if wanted in squeeze(piece):
            return piece
    return evidence


# ------------------------------------------------------------------------------------------------------ words in common

def stem(word: str) -> str:
    """A word without its commonest English endings, crude and predictable."""
    word = word.replace("'s", "").replace("’s", "")
    for ending, least, instead in (("ies", 3, "y"), ("sses", 2, "ss"), ("ings", 3, ""), ("ing", 3, ""), ("edly", 3, ""),
                                   ("ed", 3, ""), ("ers", 3, ""), ("er", 4, ""), ("ly", 3, ""), ("es", 3, ""),
                                   ("s", 3, "")):
        if word.endswith(ending) and len(word) - len(ending) >= least and not word.endswith("ss"):
            word = word[:len(word) - len(ending)] + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


def _content(text: str) -> list[str]:
    found = [w for w in re.findall(r"\w+(?:['’]\w+)?", text.lower()) if re.sub(r"['’]\w+$", "", w) not in _STOP]
    return [stem(w) for w in found]


def shared_words(question: str, passage: str, entity: str) -> float:
    """Share of a question's content words that stand in the passage or belong to the entity's proper name."""
    asked = _content(question)
    names = " ".join(w for w in entity.split() if any(c.isupper() or c.isdigit() for c in w))
    known = set(_content(passage)) | set(_content(names))
    return sum(w in known for w in asked) / len(asked) if asked else 0.0


def few_shared_words(shared: float) -> bool:
    """Whether a question that shares this part of its words is one that keyword search should find hard."""
    return shared < FEW_SHARED


# ------------------------------------------------------------------------------------------------------- splits by hash

def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join((SEED, *parts)).encode()).hexdigest()


def asked_entities(facts: Sequence[Fact]) -> dict[str, bool]:
    """Which entities training may ask about: half of each area's, and about half of its facts.

    Entities of an area are sorted by how many facts they have and paired; a seeded hash chooses one of each pair.
    An entity that two areas know is decided once. Where a training question would name an entity of the other half,
    pairs are swapped until none does.
    """
    count = Counter(f.entity.lower() for f in facts)
    home: dict[str, str] = {}
    for fact in facts:
        home.setdefault(fact.entity.lower(), fact.id.split("-")[0])
    asked, partner = {}, {}
    for area in AREAS:
        own = sorted((e for e in count if home[e] == area), key=lambda e: (-count[e], _hash("entity", area, e)))
        for first, second in zip(own[::2], [*own[1::2], ""]):
            asked[first] = int(_hash("pair", first, second), 16) % 2 == 0
            if second:
                asked[second] = not asked[first]
                partner[first], partner[second] = second, first
        if len(own) % 2:
            asked[own[-1]] = int(_hash("pair", own[-1]), 16) % 2 == 0
    names = named_entities(facts)
    for attempt in range(10_000):
        wrong = [pair for pair in names if asked[pair[0]] and not asked[pair[1]]]
        if not wrong:
            return asked
        one = min(wrong, key=lambda pair: _hash("swap", str(attempt), *pair))[int(_hash("side", str(attempt)), 16) % 2]
        for entity in (one, partner.get(one)):
            if entity:
                asked[entity] = not asked[entity]
    raise RuntimeError(f"no split of the entities keeps these out of the other half's training questions: {wrong}")


def named_entities(facts: Sequence[Fact]) -> list[tuple[str, str]]:
    """Pairs (entity, other entity that its training questions call by its proper name), in lower case."""
    proper = {f.entity.lower(): re.compile(rf"\b{re.escape(f.entity)}\b")
              for f in facts if f.entity != f.entity.lower()}
    return sorted({(f.entity.lower(), name) for f in facts for q in f.questions if q.wording <= 3
                   for name, pattern in proper.items() if name != f.entity.lower() and pattern.search(q.text)})


def ticket_splits(codes: Sequence[str]) -> list[str]:
    """"train" or "held_out" for each ticket: `TRAIN_TICKETS` for training, in proportion to the codes."""
    by_code: dict[str, list[int]] = defaultdict(list)
    for index, code in enumerate(codes):
        by_code[code].append(index)
    quota = {code: TRAIN_TICKETS * len(ids) // len(codes) for code, ids in by_code.items()}
    for code in sorted(by_code, key=lambda c: (-(TRAIN_TICKETS * len(by_code[c]) % len(codes)), c)):
        if sum(quota.values()) == TRAIN_TICKETS:
            break
        quota[code] += 1
    splits = ["held_out"] * len(codes)
    for code, ids in by_code.items():
        for index in sorted(ids, key=lambda i: _hash("ticket", code, str(i)))[:quota[code]]:
            splits[index] = "train"
    return splits


# ------------------------------------------------------------------------------------------------------ what is written

def _catalogue(documents: dict[str, Document]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CATALOGUE)
    for d in sorted(documents.values(), key=lambda d: d.id):
        writer.writerow([d.id, f"{d.id}.{d.format}", d.title, d.department, d.access_group,
                         d.effective_date.isoformat(), d.supersedes, d.author, d.format])
    return buffer.getvalue()


def _write_snapshot(documents: dict[str, Document], folder: Path) -> dict[str, str]:
    """Write the files of a snapshot; returns the text that `utils.corpus` extracts, by id."""
    folder.mkdir(parents=True)
    for document in documents.values():
        (folder / f"{document.id}.{document.format}").write_bytes(render(document))
    (folder / "catalogue.csv").write_text(_catalogue(documents), encoding="utf-8", newline="\n")
    corpus = load_folder(folder)
    if corpus.skipped:
        raise RuntimeError(f"files just written cannot be read:\n{corpus}")
    return {d.metadata["id"]: d.text for d in corpus.documents}


def _fact_rows(sources: Sources, snapshots: list[dict[str, Document]], texts: list[dict[str, str]]) -> list[dict]:
    asked = asked_entities(sources.facts)
    rows = []
    for fact in sources.facts:
        versions = []
        for number, (date, documents, text) in enumerate(zip(SNAPSHOTS, snapshots, texts), 1):
            if fact.document not in documents:
                continue
            value, piece = fact.value, fact.evidence
            changes = [c for c in sources.changes if c.document == fact.document] if number == 2 else []
            if changes:
                piece, touched = _new_evidence(sources.documents[fact.document].body, fact.evidence, changes)
                if fact.new_value and not touched:
                    sources.wrong(fact.file, fact.line, "has a new value, but no change touches its evidence")
                value = fact.new_value or fact.value
            elif number == 2 and fact.new_value:
                sources.wrong(fact.file, fact.line, f"has a new value, but {fact.document} is not changed")
            evidence = extracted_evidence(documents[fact.document], piece, text[fact.document])
            if evidence is None:
                sources.wrong(fact.file, fact.line, f"evidence is not in the extracted text of {date}: {piece[:90]}")
                continue
            if squeeze(value) not in squeeze(evidence) or squeeze(value) not in squeeze(text[fact.document]):
                sources.wrong(fact.file, fact.line,
                              f"value '{value}' is not in the evidence of {date}: {evidence[:120]}")
            versions.append({"snapshot": date, "document": fact.document, "value": value, "evidence": evidence})
        rows.append({"id": fact.id, "entity": fact.entity, "attribute": fact.attribute, "also": list(fact.also),
                     "access_group": sources.documents[fact.document].access_group, "versions": versions,
                     "superseded": _superseded(fact, sources, snapshots, texts),
                     "asked": asked[fact.entity.lower()], "changed": bool(fact.new_value)})
    return rows


def _superseded(fact: Fact, sources: Sources, snapshots: list[dict[str, Document]],
                texts: list[dict[str, str]]) -> dict[str, str] | None:
    if fact.old is None:
        return None
    value, document, piece = fact.old
    found = None
    for documents, text in zip(snapshots, texts):
        if document in documents:
            found = extracted_evidence(documents[document], piece, text[document])
            if found is None:
                sources.wrong(fact.file, fact.line, f"old evidence is not in the extracted text: {piece[:90]}")
    return {"document": document, "value": value, "evidence": found or piece}


def _question_rows(sources: Sources, facts: list[dict], texts: list[dict[str, str]]) -> list[dict]:
    rows = []
    for fact, row in zip(sources.facts, facts):
        if not row["versions"]:
            continue
        version = row["versions"][0]
        passage = _passage(texts[SNAPSHOTS.index(version["snapshot"])][version["document"]], version["evidence"])
        for question in fact.questions:
            shared = round(shared_words(question.text, passage, fact.entity), 3)
            rows.append({"id": f"{fact.id}-{question.wording}", "fact": fact.id, "wording": question.wording,
                         "split": "train" if question.wording <= 3 else "held_out", "text": question.text,
                         "kind": "conflict" if fact.old else "lookup", "shared": shared,
                         "few_shared": few_shared_words(shared)})
    return rows


def _ticket_rows(sources: Sources) -> list[dict]:
    order = sorted(sources.tickets, key=lambda t: _hash("order", t.text))  # their own order would betray the codes
    splits = ticket_splits([t.code for t in order])
    return [{"id": f"ticket-{number:04d}", "code": t.code, "channel": t.channel, "text": t.text, "split": split}
            for number, (t, split) in enumerate(zip(order, splits), 1)]


def _unanswerable_rows(sources: Sources) -> list[dict]:
    count: Counter[str] = Counter()
    rows = []
    for question in sources.unanswerable:
        area = Path(question.file).stem
        count[area] += 1
        rows.append({"id": f"{area}-u{count[area]:02d}", "text": question.text, "document": question.document})
    return rows


def _injection_rows(sources: Sources, texts: list[dict[str, str]]) -> list[dict]:
    for i in sources.injections:
        for date, text in zip(SNAPSHOTS, texts):
            if i.document in text and squeeze(i.sentence) not in squeeze(text[i.document]):
                sources.wrong(i.file, i.line, f"the sentence is not in the extracted text of {date}")
    return [{"document": i.document, "sentence": i.sentence, "marker": i.marker} for i in sources.injections]


def _check_changes(sources: Sources) -> None:
    """Every change must touch a fact that has a new value."""
    for change in sources.changes:
        facts = [f for f in sources.facts if f.document == change.document and f.new_value]
        body = sources.documents[change.document].body
        if not any(_new_evidence(body, f.evidence, [change])[1] for f in facts):
            sources.wrong(change.file, change.line, "this change touches no fact that has a new value")


def _jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def card_counts(folder: Path) -> str:
    """The table of counts for the data card, from the data in `folder` (which has knowledge_base and questions)."""
    read = {name: [json.loads(line)
                   for line in (folder / "questions" / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in ("facts", "questions", "unanswerable", "injections", "tickets")}
    lists = []
    for date in SNAPSHOTS:
        with (folder / "knowledge_base" / date / "catalogue.csv").open(encoding="utf-8", newline="") as file:
            lists.append(list(csv.DictReader(file)))
    group = {f["id"]: f["id"].split("-")[0] for f in read["facts"]}
    lines = ["| area | documents " + " | documents ".join(SNAPSHOTS) + " | facts | changed | conflicts | questions | "
             "few shared words | unanswerable | injected |", "|---" + "|--:" * 9 + "|"]

    def row(name: str, areas: set[str]) -> str:
        facts = [f for f in read["facts"] if group[f["id"]] in areas]
        questions = [q for q in read["questions"] if group[q["fact"]] in areas]
        cells = [*(sum(d["id"][:2] in areas for d in documents) for documents in lists), len(facts),
                 sum(f["changed"] for f in facts), sum(f["superseded"] is not None for f in facts), len(questions),
                 f"{100 * sum(q['few_shared'] for q in questions) / len(questions):.0f} %",
                 sum(u["id"][:2] in areas for u in read["unanswerable"]),
                 sum(i["document"][:2] in areas for i in read["injections"])]
        return f"| {name} | " + " | ".join(map(str, cells)) + " |"

    lines += [row(f"{area}: {AREA_NAMES[area]}", {area}) for area in AREAS] + [row("**all**", set(AREAS)), ""]
    ids = [{d["id"] for d in documents} for documents in lists]
    entities = {f["entity"].lower(): f["asked"] for f in read["facts"]}
    tickets = Counter(t["split"] for t in read["tickets"])

    def tally(values: Iterable[str]) -> str:
        return ", ".join(f"{name} {n}" for name, n in Counter(values).most_common())

    facts, questions = read["facts"], read["questions"]
    changed = {f["versions"][0]["document"] for f in facts if f["changed"]}
    lines.append(f"- Formats ({SNAPSHOTS[0]}): {tally(d['format'] for d in lists[0])}.")
    lines.append(f"- Access groups ({SNAPSHOTS[0]}): {tally(d['access_group'] for d in lists[0])}.")
    lines.append(f"- Between the snapshots {len(ids[0] - ids[1])} documents were withdrawn and {len(ids[1] - ids[0])} "
                 f"added; {sum(f['changed'] for f in facts)} facts changed in {len(changed)} documents.")
    lines.append(f"- Entities: {len(entities)}, of which training may ask about {sum(entities.values())} "
                 f"({sum(f['asked'] for f in facts)} facts).")
    lines.append(f"- Questions: {tally(q['split'] for q in questions)}; {tally(q['kind'] for q in questions)}.")
    lines.append(f"- Tickets: {len(read['tickets'])} in {len({t['code'] for t in read['tickets']})} codes; train "
                 f"{tickets['train']}, held_out {tickets['held_out']}.")
    return "\n".join(lines) + "\n"


def _update_card(card: Path, counts: str) -> None:
    text = card.read_text(encoding="utf-8")
    if text.count(CARD_START) != 1 or text.count(CARD_END) != 1:
        raise ValueError(f"{card}: expected the lines '{CARD_START}' and '{CARD_END}' once each")
    before, rest = text.split(CARD_START)
    new = f"{before}{CARD_START}\n{counts}{CARD_END}{rest.split(CARD_END)[1]}"
    part = card.with_name(card.name + ".part")
    part.write_text(new, encoding="utf-8", newline="\n")
    os.replace(part, card)


def _write(sources: Sources, folder: Path) -> None:
    """Everything below `folder`. Raises SourceError after collecting all problems."""
    if sources.problems:
        raise SourceError(sources.problems)
    _check_changes(sources)
    snapshots = [snapshot_documents(sources, number) for number in (1, 2)]
    texts = [_write_snapshot(documents, folder / "knowledge_base" / date)
             for date, documents in zip(SNAPSHOTS, snapshots)]
    facts = _fact_rows(sources, snapshots, texts)
    rows = {"facts": facts, "questions": _question_rows(sources, facts, texts),
            "unanswerable": _unanswerable_rows(sources), "injections": _injection_rows(sources, texts),
            "tickets": _ticket_rows(sources)}
    if sources.problems:
        raise SourceError(sources.problems)
    (folder / "questions").mkdir()
    for name, content in rows.items():
        (folder / "questions" / f"{name}.jsonl").write_text(_jsonl(content), encoding="utf-8", newline="\n")


def build(target: Path = TARGET, source: Path = SOURCE) -> None:
    """Build the data below `target`: both parts are written to a temporary folder first, then put in place.

    Raises
    ------
    SourceError : something is wrong with the sources; the message lists everything. Nothing is written then.
    """
    sources = read_sources(source)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".build-", suffix=".part") as temporary:
        folder = Path(temporary)
        _write(sources, folder)
        if (target / "README.md").exists():
            _update_card(target / "README.md", card_counts(folder))
        for name in ("knowledge_base", "questions"):
            before = folder / f"{name}-before"
            if (target / name).exists():
                os.replace(target / name, before)
            try:
                os.replace(folder / name, target / name)
            except OSError:
                if before.exists():
                    os.replace(before, target / name)
                raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write to (default: data)")
    target = parser.parse_args().target
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    try:
        build(target)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 1
    print(card_counts(target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
