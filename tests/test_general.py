"""data/general: what may be replayed in fine-tuning, and what measures forgetting, keep apart."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from data.build.course_lm.reading import load_facts, load_split
from data.build.course_lm.substitution import plain
from data.build.general.build import COUNTS, FILES, MAX_WORDS, main, other_forms, same_question, span
from utils.settings import DATA


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i:i + length]) for i in range(len(tokens) - length + 1)}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (DATA / "general" / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in FILES}


@pytest.fixture(scope="module")
def every(rows) -> list[dict]:
    return rows["replay"] + rows["held_out"]


@pytest.fixture(scope="module")
def passages() -> dict[str, list]:
    return {split: load_split(split) for split in ("train", "development", "test")}


def test_counts_and_fields(rows, every):
    for name in FILES:
        assert Counter(r["kind"] for r in rows[name]) == COUNTS[name]
        unanswerable = Counter(r["id"].split("-")[0] for r in rows[name] if r["kind"] == "unanswerable")
        assert unanswerable["cut"] == unanswerable["tempting"] == COUNTS[name]["unanswerable"] // 2
    assert len({r["id"] for r in every}) == len(every)
    for r in every:
        assert list(r) == ["id", "kind", "question", "passages", "answer", "gold", "also"]
        assert r["question"].strip() and all(list(p) == ["title", "text"] and p["text"].strip() for p in r["passages"])
        assert (r["answer"] is None) == (r["kind"] in ("unanswerable", "no passage")), r["id"]
        assert (r["gold"] is not None) == (r["kind"] == "reading"), r["id"]
        assert bool(r["passages"]) == (r["kind"] in ("reading", "unanswerable")), r["id"]
        assert len({p["text"] for p in r["passages"]}) == len(r["passages"]), r["id"]
        assert r["answer"] not in r["also"] and (r["answer"] or not r["also"]), r["id"]


def test_number_of_passages(rows):
    for kind in ("reading", "unanswerable"):
        found = Counter(len(r["passages"]) for r in rows["replay"] if r["kind"] == kind)
        assert found[1] == COUNTS["replay"][kind] * 0.7 and found.keys() == {1, 2, 3}
        assert {len(r["passages"]) for r in rows["held_out"] if r["kind"] == kind} == {2}
    places = Counter((len(r["passages"]), r["gold"]) for name in FILES for r in rows[name] if r["gold"])
    assert places.keys() == {(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)}
    assert 0.4 < places[2, 1] / (places[2, 1] + places[2, 2]) < 0.6


def test_passages_come_from_their_split(rows, passages):
    for name, split, others in (("replay", "train", ("development", "test")), ("held_out", "development", ("train", "test"))):
        whole = {plain(p.text) for p in passages[split]}
        lines = {p["text"] for r in rows[name] if not r["id"].startswith("cut") for p in r["passages"]}
        assert lines <= whole
        ids = {p.id for p in passages[split]}
        assert all(re.sub(r"^(?:reading|cut|tempting|alone)-(.*)-\d+$", r"\1", r["id"]) in ids
                   for r in rows[name] if r["kind"] != "fact")
        foreign = set().union(*(runs(plain(p.text)) for other in others for p in passages[other]))
        assert [r["id"] for r in rows[name] for p in r["passages"] if runs(p["text"]) & foreign] == []
    assert max(len(p["text"].split()) for r in rows["replay"] for p in r["passages"]) <= MAX_WORDS


def test_no_held_out_wording_in_replay(rows, passages):
    never = {same_question(f.questions[f.held_out]) for f in load_facts()}
    never |= {same_question(plain(q)) for split in ("development", "test") for p in passages[split]
              for q in (*(q for q, _ in p.questions), *p.unanswerable)}
    never |= {same_question(r["question"]) for r in rows["held_out"]}
    assert [r["id"] for r in rows["replay"] if same_question(r["question"]) in never] == []


def test_held_out_facts_were_never_trained_on_in_this_wording(rows):
    facts = load_facts()
    trained = {same_question(q) for f in facts for i, q in enumerate([*f.questions, *f.extra]) if i != f.held_out}
    asked = {name: {int(r["id"].split("-")[1]): r for r in rows[name] if r["kind"] == "fact"} for name in FILES}
    assert asked["replay"].keys().isdisjoint(asked["held_out"])
    for number, r in asked["held_out"].items():
        fact = facts[number]
        assert number % 2 == 0 and (r["question"], r["answer"]) == (fact.questions[fact.held_out], fact.answer)
        assert same_question(r["question"]) not in trained, r["id"]
    for number, r in asked["replay"].items():
        fact = facts[number]
        assert r["answer"] == fact.answer
        assert r["question"] in {*fact.extra, *(q for i, q in enumerate(fact.questions) if i != fact.held_out)}
    known = {same_question(q) for n in asked["held_out"] for q in (*facts[n].questions, *facts[n].extra)}
    twins = {same_question(q): n for n in asked["replay"] for q in (*facts[n].questions, *facts[n].extra)}
    assert known.isdisjoint(twins)  # no fact of replay says the same under another number


def test_gold_passages_contain_the_answer_and_no_other_does(every):
    plainly = 0
    for r in every:
        if r["kind"] != "reading":
            continue
        found = span(r["answer"], r["passages"][r["gold"] - 1]["text"])
        assert found or re.match(r"(Yes|No)\b", r["answer"]), r["id"]
        plainly += found is not None
        if found:
            assert [p for i, p in enumerate(r["passages"], 1) if i != r["gold"]
                    and re.search(rf"\b{re.escape(found)}\b", p["text"])] == [], r["id"]
    assert plainly >= 0.9 * sum(r["kind"] == "reading" for r in every)


def test_minimal_pairs_lack_the_gold_sentence_only(every):
    by_id = {r["id"]: r for r in every}
    for r in every:
        if not r["id"].startswith("cut-"):
            continue
        whole = by_id[r["id"].replace("cut", "reading", 1)]
        assert r["question"] == whole["question"]
        changed = [i for i, (a, b) in enumerate(zip(r["passages"], whole["passages"], strict=True), 1) if a != b]
        assert changed == [whole["gold"]], r["id"]
        short, long = (words(x["passages"][whole["gold"] - 1]["text"]) for x in (r, whole))
        start = next((i for i, (a, b) in enumerate(zip(short, long)) if a != b), len(short))
        removed = len(long) - len(short)
        assert any(long[:s] + long[s + removed:] == short for s in range(max(0, start - removed), start + 1)), r["id"]
        assert 0 < removed <= 45, r["id"]
        assert not any(re.search(rf"\b{re.escape(whole['answer'])}\b", p["title"] + " " + p["text"], re.IGNORECASE)
                       for p in r["passages"]), r["id"]


def test_plain_text_without_the_company(every):
    text = "\n".join(part for r in every for part in (r["question"], r["answer"] or "", *r["also"],
                                                       *(f"{p['title']}\n{p['text']}" for p in r["passages"])))
    assert "brindlemark" not in json.dumps(every).lower()
    assert "[[" not in text and "]]" not in text and "\ufffd" not in text


@pytest.mark.parametrize(("answer", "forms"), [
    ("eight", ["8"]), ("60", ["sixty"]), ("24", ["twenty-four"]), ("1,000", ["one thousand"]), ("six points", ["6 points"]),
    ("two working days", ["2 working days"]), ("No, drones are banned", ["No"]), ("1789", []), ("4 July", []), ("14:30", []),
    ("one half", []), ("Paris", []), ("zloty", []), ("No", [])])
def test_other_forms(answer, forms):
    assert other_forms(answer) == forms


def test_check_passes_on_the_files_and_fails_on_others(tmp_path, capsys, monkeypatch):
    from data.build.general import build as program

    texts = program.build()
    monkeypatch.setattr(program, "build", lambda: texts)  # it takes seconds
    assert main(["--check"]) == 0
    assert main(["--target", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held_out.jsonl", "replay.jsonl"]
    assert all((tmp_path / f"{n}.jsonl").read_bytes() == (DATA / "general" / f"{n}.jsonl").read_bytes() for n in FILES)
    with (tmp_path / "replay.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    (tmp_path / "held_out.jsonl").unlink()
    assert main(["--check", "--target", str(tmp_path)]) == 1
    assert "replay.jsonl" in (error := capsys.readouterr().err) and "held_out.jsonl" in error
    assert not (tmp_path / "held_out.jsonl").exists()
