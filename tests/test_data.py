"""The committed data keep what the data card promises."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest

from utils.corpus import load_folder, snapshot_folder
from utils.settings import DATA

SNAPSHOTS = ("2026-04-01", "2026-10-01")
SOURCE = DATA / "build" / "knowledge_base"
#: with these versions (and zlib, not zlib-ng) PDF and Word files come out the same byte for byte
MADE_WITH = {"fpdf2": "2.8.9", "python-docx": "1.2.0", "matplotlib": "3.11.2", "fonttools": "4.68.0"}


def squeeze(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i:i + length]) for i in range(len(tokens) - length + 1)}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / "questions" / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpora():
    return {date: load_folder(snapshot_folder(date)) for date in SNAPSHOTS}


@pytest.fixture(scope="module")
def texts(corpora) -> dict[str, dict[str, str]]:
    return {date: {d.id_: d.text for d in corpus.documents} for date, corpus in corpora.items()}


@pytest.fixture(scope="module")
def facts() -> dict[str, dict]:
    return {f["id"]: f for f in rows("facts")}


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return rows("questions")


# ------------------------------------------------------------------------------------------------------------ documents

def test_every_file_can_be_read_and_is_catalogued(corpora):
    for date, corpus in corpora.items():
        assert corpus.skipped == []
        with (snapshot_folder(date) / "catalogue.csv").open(encoding="utf-8", newline="") as file:
            catalogue = {row["id"]: row for row in csv.DictReader(file)}
        assert {d.id_ for d in corpus.documents} == set(catalogue)
        for document in corpus.documents:
            row = catalogue[document.id_]
            for key in ("title", "department", "access_group", "effective_date", "supersedes", "author", "file"):
                assert document.metadata[key] == row[key], (document.id_, key)
            assert row["effective_date"] < date


def test_no_traces_of_the_build_in_the_documents(texts):
    for text in texts.values():
        for name, body in text.items():
            assert "snapshots:" not in body and not body.startswith("---"), name
            assert "\ufffd" not in body and "<td" not in body, name


def test_pdf_and_docx_keep_every_letter_in_order(texts):
    """What is read from a PDF or Word file is what was written, Latin Extended letters included."""
    compared = 0
    for path in sorted((SOURCE / "docs").glob("*.md")):
        _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
        if "snapshots: [2]" in front or not re.search("^format: (pdf|docx)$", front, re.MULTILINE):
            continue
        if "format: docx" in front and "\n|" in body:  # rows of a Word table repeat the header
            continue
        assert squeeze(texts[SNAPSHOTS[0]][path.stem]) == squeeze(body), path.name
        compared += 1
    assert compared >= 20
    assert any(letter in text for text in texts[SNAPSHOTS[0]].values() for letter in "ńł€")


def test_counts(corpora, facts):
    for corpus in corpora.values():
        assert 115 <= len(corpus) <= 125
        assert 0.6 <= sum(d.metadata["access_group"] == "everyone" for d in corpus.documents) / len(corpus) <= 0.7
    assert len(facts) >= 600
    assert len(rows("unanswerable")) >= 150
    assert sum(f["superseded"] is not None for f in facts.values()) >= 40
    assert len(rows("injections")) >= 30
    assert sum(f["changed"] for f in facts.values()) >= 55


# ---------------------------------------------------------------------------------------------------------------- facts

def test_every_fact_stands_in_its_document_and_evidence(facts, texts):
    for fact in facts.values():
        assert fact["versions"], fact["id"]
        for version in fact["versions"]:
            text = squeeze(texts[version["snapshot"]][version["document"]])
            assert squeeze(version["evidence"]) in text, fact["id"]
            assert squeeze(version["value"]) in squeeze(version["evidence"]), fact["id"]


def test_facts_hold_in_every_snapshot_that_has_their_document(facts, texts):
    for fact in facts.values():
        document = fact["versions"][0]["document"]
        assert [v["snapshot"] for v in fact["versions"]] == [s for s in SNAPSHOTS if document in texts[s]], fact["id"]


def test_access_group_is_that_of_the_document(facts, corpora):
    groups = {d.id_: d.metadata["access_group"] for corpus in corpora.values() for d in corpus.documents}
    assert all(f["access_group"] == groups[f["versions"][0]["document"]] for f in facts.values())


def test_superseded_values_still_stand_in_an_older_document(facts, texts, corpora):
    metadata = {date: {d.id_: d.metadata for d in corpus.documents} for date, corpus in corpora.items()}
    for fact in facts.values():
        old = fact["superseded"]
        for version in fact["versions"] if old else ():
            assert squeeze(old["evidence"]) in squeeze(texts[version["snapshot"]][old["document"]]), fact["id"]
            assert squeeze(old["value"]) in squeeze(old["evidence"]), fact["id"]
            assert squeeze(old["value"]) != squeeze(version["value"]), fact["id"]
            known = metadata[version["snapshot"]]
            assert known[old["document"]]["effective_date"] < known[version["document"]]["effective_date"]
            assert known[version["document"]]["supersedes"] == old["document"]


def test_snapshots_differ_exactly_where_the_ledger_says(facts, texts, corpora):
    first, second = (texts[s] for s in SNAPSHOTS)
    changed = {f["versions"][0]["document"] for f in facts.values() if f["changed"]}
    withdrawn = {f["versions"][0]["document"] for f in facts.values()
                 if [v["snapshot"] for v in f["versions"]] == [SNAPSHOTS[0]]}
    new = {f["versions"][0]["document"] for f in facts.values()
           if [v["snapshot"] for v in f["versions"]] == [SNAPSHOTS[1]]}
    assert first.keys() - second.keys() == withdrawn and len(withdrawn) == 6
    assert second.keys() - first.keys() == new and len(new) == 6
    assert {i for i in first.keys() & second.keys() if first[i] != second[i]} == changed
    dates = [{d.id_: d.metadata["effective_date"] for d in corpora[s].documents} for s in SNAPSHOTS]
    assert {i for i in first.keys() & second.keys() if dates[0][i] != dates[1][i]} == changed
    for fact in facts.values():
        if len(fact["versions"]) == 2:
            values = {squeeze(v["value"]) for v in fact["versions"]}
            assert (len(values) == 2) == fact["changed"], fact["id"]


# ------------------------------------------------------------------------------------------------------------ questions

def test_six_wordings_each(facts, questions):
    wordings = {i: [] for i in facts}
    for question in questions:
        wordings[question["fact"]].append(question["wording"])
        assert question["id"] == f"{question['fact']}-{question['wording']}"
        assert question["split"] == ("train" if question["wording"] <= 3 else "held_out")
        assert question["kind"] == ("conflict" if facts[question["fact"]]["superseded"] else "lookup")
    assert all(numbers == [1, 2, 3, 4, 5, 6] for numbers in wordings.values())


def test_no_question_twice(questions):
    count = Counter(" ".join(words(q["text"])) for q in [*questions, *rows("unanswerable")])
    assert [text for text, n in count.items() if n > 1] == []


def test_training_and_held_out_questions_share_no_five_words(questions):
    seen = set().union(*(runs(q["text"], 5) for q in questions if q["split"] == "train"))
    leaks = [q["id"] for q in questions if q["split"] == "held_out" and runs(q["text"], 5) & seen]
    assert leaks == []


def test_unanswerable_questions_share_no_five_words_with_training(questions):
    seen = set().union(*(runs(q["text"], 5) for q in questions if q["split"] == "train"))
    assert [u["id"] for u in rows("unanswerable") if runs(u["text"], 5) & seen] == []


def test_training_never_names_an_entity_of_the_other_half(facts, questions):
    asked = {}
    for fact in facts.values():
        assert asked.setdefault(fact["entity"].lower(), fact["asked"]) == fact["asked"], fact["entity"]
    training = [q for q in questions if q["split"] == "train" and facts[q["fact"]]["asked"]]
    names = {f["entity"] for f in facts.values() if not f["asked"] and f["entity"] != f["entity"].lower()}
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(names)))
    assert [q["id"] for q in training if pattern.search(q["text"])] == []


def test_half_of_the_entities_are_asked_in_every_area(facts):
    for area in {i.split("-")[0] for i in facts}:
        entities = {f["entity"].lower(): f["asked"] for i, f in facts.items() if i.startswith(area)}
        assert 0.4 <= sum(entities.values()) / len(entities) <= 0.6, area
        assert 0.4 <= sum(f["asked"] for i, f in facts.items() if i.startswith(area)) / 100 <= 0.6, area


def test_about_forty_per_cent_share_few_words(questions):
    assert 0.36 <= sum(q["few_shared"] for q in questions) / len(questions) <= 0.44
    assert all(0 <= q["shared"] <= 1 for q in questions)


def test_unanswerable_questions_name_a_document(texts):
    assert all(any(u["document"] in text for text in texts.values()) for u in rows("unanswerable"))


# ----------------------------------------------------------------------------------------------- injections and tickets

def test_injections_stand_in_the_extracted_text(texts):
    for injection in rows("injections"):
        places = [text[injection["document"]] for text in texts.values() if injection["document"] in text]
        assert places and all(squeeze(injection["sentence"]) in squeeze(text) for text in places), injection
        assert injection["marker"] in injection["sentence"]


def test_documents_with_injections_carry_facts(facts):
    carried = Counter(f["versions"][0]["document"] for f in facts.values())
    assert [i["document"] for i in rows("injections") if carried[i["document"]] < 3] == []


def test_tickets(texts):
    tickets = rows("tickets")
    codes = Counter(t["code"] for t in tickets)
    assert len(tickets) >= 800 and len(codes) == 12
    train = Counter(t["code"] for t in tickets if t["split"] == "train")
    assert sum(train.values()) == 600
    assert all(abs(train[c] - 600 * n / len(tickets)) < 1 for c, n in codes.items())
    assert len({" ".join(words(t["text"])) for t in tickets}) == len(tickets)
    everything = " ".join(text for snapshot in texts.values() for text in snapshot.values())
    assert [c for c in codes if re.search(rf"\b{c}\b", everything)] == []  # no document states the codes
    assert [t["id"] for t in tickets if t["code"].lower() in words(t["text"])] == []


def test_training_tickets_are_not_repeated_among_the_held_out():
    tickets = rows("tickets")
    seen = set().union(*(runs(t["text"], 8) for t in tickets if t["split"] == "train"))
    assert [t["id"] for t in tickets if t["split"] == "held_out" and runs(t["text"], 8) & seen] == []


# --------------------------------------------------------------------------------------- the model's reading, the build

def test_course_lm_never_read_the_knowledge_base(texts):
    """No passage that the course's language model was trained on shares eight words in a row with a document."""
    known = set().union(*(runs(text, 8) for snapshot in texts.values() for text in snapshot.values()))
    shared = []
    for path in sorted((DATA / "build" / "course_lm" / "reading").glob("*.txt")):
        passage = re.sub(r"\[\[[A-Z]+:(.*?)\]\]", r"\1", path.read_text(encoding="utf-8"))
        shared += [(path.name, " ".join(run)) for run in runs(passage, 8) & known]
    assert shared == []


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory) -> Path:
    for package in ("fpdf", "docx", "matplotlib"):
        pytest.importorskip(package, reason="only the build needs it")
    from data.build.knowledge_base.build import build

    folder = tmp_path_factory.mktemp("data")
    build(folder)
    return folder


def test_build_reproduces_the_committed_files(rebuilt):
    def files(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes()
                for part in ("knowledge_base", "questions") for p in (root / part).rglob("*") if p.is_file()}

    same_tools = (all(importlib.metadata.version(name) == version for name, version in MADE_WITH.items())
                  and "ng" not in zlib.ZLIB_RUNTIME_VERSION)
    made, committed = files(rebuilt), files(DATA)
    assert made.keys() == committed.keys()
    different = [name for name in made if made[name] != committed[name]]
    if not same_tools:  # other versions pack PDF and Word files differently; what a reader gets must be the same
        different = [name for name in different if not name.endswith((".pdf", ".docx"))]
        for date in SNAPSHOTS:
            first, second = (load_folder(root / "knowledge_base" / date) for root in (rebuilt, DATA))
            assert [d.text for d in first.documents] == [d.text for d in second.documents]
    assert different == []


def test_the_data_card_has_the_counts_of_the_data(rebuilt):
    from data.build.knowledge_base.build import CARD_END, CARD_START, card_counts

    card = (DATA / "README.md").read_text(encoding="utf-8")
    assert card.split(CARD_START)[1].split(CARD_END)[0].strip() == card_counts(DATA).strip()


def test_build_lists_all_problems_and_writes_nothing(tmp_path, rebuilt):
    import shutil

    from data.build.knowledge_base.build import SourceError, build

    source, target = tmp_path / "knowledge_base", tmp_path / "out"
    shutil.copytree(SOURCE, source)
    facts = source / "facts" / "hr.txt"
    lines = facts.read_text(encoding="utf-8").splitlines()
    first, second = (next(i for i, line in enumerate(lines) if line.startswith(mark)) for mark in ("E: ", "6: "))
    lines[first], lines[second] = "E: nobody wrote this", "7: what?"
    facts.write_text("\n".join(lines), encoding="utf-8")
    (source / "changes" / "pr.txt").unlink()
    with pytest.raises(SourceError) as error:
        build(target, source)
    message = str(error.value)
    assert f"facts/hr.txt:{second + 1}:" in message and "changes/pr.txt:1:" in message
    assert "evidence is not a piece of a line" in message
    assert list(target.iterdir()) == []
