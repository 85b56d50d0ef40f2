"""Write data/general: general examples to mix into fine-tuning, and others that measure what it forgot.

    python -m data.build.general.build            # both files
    python -m data.build.general.build --check    # writes nothing; fails if the files are not what would be written

Everything comes from the passages and facts that CourseLM was trained or measured on (`data/build/course_lm/reading`);
nothing is about the course's company. Replay takes passages of the training split and training wordings, the held-out
file passages of the development split and held-out wordings. The two share no passage, no question and no fact.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.evaluation import normalise

from ..course_lm.mixing import _span_of, without_gold_sentence
from ..course_lm.reading import Fact, Passage, load_facts, load_split
from ..course_lm.substitution import plain

__all__ = ["COUNTS", "FILES", "MAX_WORDS", "SEED", "build", "counts", "main", "other_forms", "same_question", "span", "write"]

TARGET = Path(__file__).resolve().parents[2] / "general"
FILES = ("replay", "held_out")
SEED = "general-1"
MAX_WORDS = 120  # of a passage in replay: short ones keep training cheap
COUNTS = {"replay": {"fact": 400, "reading": 500, "unanswerable": 200, "no passage": 100},
          "held_out": {"fact": 300, "reading": 200, "unanswerable": 150, "no passage": 50}}

_UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
          "seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {n: _UNITS[n] if n < 20 else _TENS[n // 10 - 2] + (f"-{_UNITS[n % 10]}" if n % 10 else "") for n in range(100)}
_WORDS |= {100: "one hundred", 1000: "one thousand"}
_DIGITS = {word: str(n) for n, word in _WORDS.items()}
#: full stops that end no sentence: abbreviations, numbered lists
_OTHER_STOP = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|St|Nr|Prof|Rev|approx|ca|vs|etc|e\.g|i\.e|a\.m|p\.m|[A-Z])\.(?=\s)"
                         r"|\bNo\.\s\d|^\W*\d+\.\s", re.MULTILINE)


# ---------------------------------------------------------------------------------------------------- questions, answers

def same_question(text: str) -> str:
    """What two questions share that differ in capitals and final marks only."""
    return " ".join(text.lower().rstrip("?. ").split())


def span(answer: str, text: str) -> str | None:
    """The answer as it stands in the text, without a leading "Yes, " or "No, "; None if it does not stand there."""
    return _span_of(answer, text)


def other_forms(answer: str) -> list[str]:
    """Other ways to write an answer: a leading number in words or digits, "No, …" as "No"."""
    forms = []
    if re.fullmatch(r"one (?:half|third|quarter|\w+th)", answer):
        return []
    if match := re.match(r"(Yes|No)\b\W+\w", answer):
        forms.append(match.group(1))
    for pattern in (r"(\d[\d,]*|[a-z-]+)$", r"(\d+|[a-z-]+)(?= [a-z°])", r"(one (?:hundred|thousand))(?= [a-z]|$)"):
        if match := re.match(pattern, answer):
            number, rest = match.group(1).replace(",", ""), answer[match.end():]
            if number.isdigit():
                forms += [_WORDS[int(number)] + rest] if int(number) in _WORDS else []
            elif number in _DIGITS:
                forms.append(_DIGITS[number] + rest)
    return [form for form in dict.fromkeys(forms) if normalise(form) != normalise(answer)]


def _record(id_: str, kind: str, question: str, passages: Sequence[dict] = (), answer: str | None = None,
            gold: int | None = None, also: Iterable[str] = ()) -> dict:
    return {"id": id_, "kind": kind, "question": question, "passages": list(passages), "answer": answer, "gold": gold,
            "also": list(also)}


# ----------------------------------------------------------------------------------------------------------------- facts

def _twins(facts: Sequence[Fact]) -> dict[int, set[int]]:
    """For each fact the others that say the same: they share a wording, or most of their words and the answer."""
    found: dict[int, set[int]] = {f.index: set() for f in facts}
    asked = [{same_question(q) for q in (*f.questions, *f.extra)} for f in facts]
    words = [set(re.findall(r"\w{4,}", " ".join([*f.statements, *f.questions]).lower())) for f in facts]
    answers = [f"{normalise(f.answer)} " for f in facts]
    for i, f in enumerate(facts):
        for j in range(i):
            alike = answers[i].startswith(answers[j]) or answers[j].startswith(answers[i])
            if (alike and len(words[i] & words[j]) >= 0.6 * min(len(words[i]), len(words[j]))
                    or not asked[i].isdisjoint(asked[j])):
                found[f.index].add(facts[j].index)
                found[facts[j].index].add(f.index)
    return found


def _facts(size: dict[str, int]) -> dict[str, list[dict]]:
    """Closed-book facts: the held-out ones first, with all their twins kept out of replay."""
    rng = random.Random(f"{SEED}-facts")
    facts = load_facts()
    twins = _twins(facts)
    trained = Counter(q for f in facts for q in {same_question(q) for q in f.trained})
    never = {same_question(f.questions[f.held_out]) for f in facts}
    out: dict[str, list[dict]] = {name: [] for name in FILES}
    used: set[int] = set()
    for fact in rng.sample(facts, len(facts)):  # even numbers measure development, odd ones the model card
        question = fact.questions[fact.held_out]
        if (len(out["held_out"]) == size["held_out"] or fact.index % 2 or fact.index in used
                or trained[same_question(question)]):
            continue
        used |= {fact.index} | twins[fact.index]
        out["held_out"].append((fact, question))
    for fact in rng.sample([f for f in facts if f.index not in used], len(facts) - len(used)):
        questions = [q for q in fact.trained if same_question(q) not in never]
        if len(out["replay"]) < size["replay"] and questions and fact.index not in used:
            used |= {fact.index} | twins[fact.index]
            out["replay"].append((fact, rng.choice(questions)))
    by_index = {f.index: f for f in facts}
    return {name: [_record(f"fact-{f.index:04}", "fact", q, answer=f.answer, also=dict.fromkeys([
        *other_forms(f.answer), *(by_index[t].answer for t in sorted(twins[f.index])
                                  if normalise(by_index[t].answer).startswith(normalise(f.answer))
                                  and normalise(by_index[t].answer) != normalise(f.answer))])) for f, q in rows]
            for name, rows in out.items()}


# -------------------------------------------------------------------------------------------------------------- passages

class _Passages:
    """Draws from the passages of one split; never asks the same question twice, and no question in `taken`."""

    def __init__(self, passages: Sequence[Passage], name: str, taken: set[str]):
        self.passages, self.rng, self.taken = passages, random.Random(f"{SEED}-{name}"), set(taken)
        self.used: Counter[str] = Counter()  # questions asked about a passage

    def questions(self, kind: str, size: int, most: int) -> list[tuple[Passage, int, str, str | None]]:
        """`size` questions (answerable or not) about passages that have been asked about fewer than `most` times."""
        every = [(p, n, plain(question), answer and plain(answer)) for p in self.passages
                 for n, (question, answer) in enumerate(p.questions if kind == "reading" else
                                                        [(u, None) for u in p.unanswerable], 1)]
        chosen = []
        for passage, n, question, answer in self.rng.sample(every, len(every)):
            if self.used[passage.id] >= most or same_question(question) in self.taken:
                continue
            if answer and not span(answer, plain(passage.text)) and not re.match(r"(Yes|No)\b", answer):
                continue
            chosen.append((passage, n, question, answer))
            self.used[passage.id] += 1
            self.taken.add(same_question(question))
            if len(chosen) == size:
                return chosen
        raise ValueError(f"only {len(chosen)} of {size} '{kind}' questions could be found; allow more than {most} a passage")

    def among(self, passage: Passage, others: int, answer: str | None) -> tuple[list[dict], int]:
        """The passage at a random place among others (of another domain, without the answer), and that place."""
        forms = [answer, *other_forms(answer)] if answer else []
        blocks: list[dict] = []
        while len(blocks) < others:
            other = self.rng.choice(self.passages)
            block = _block(other)
            if other.domain != passage.domain and block not in blocks and not any(
                    _stands(form, f"{block['title']} {block['text']}") for form in forms):
                blocks.append(block)
        place = self.rng.randint(0, others)
        blocks.insert(place, _block(passage))
        return blocks, place + 1

    def reading(self, size: int, others: Sequence[int], most: int) -> list[dict]:
        rows = []
        for (passage, n, question, answer), number in zip(self.questions("reading", size, most), others, strict=True):
            blocks, gold = self.among(passage, number, span(answer, plain(passage.text)))
            rows.append(_record(f"reading-{passage.id}-{n}", "reading", question, blocks, answer, gold, other_forms(answer)))
        return rows

    def tempting(self, size: int, others: Sequence[int], most: int) -> list[dict]:
        """The passage's own question that it does not answer."""
        return [_record(f"tempting-{passage.id}-{n}", "unanswerable", question, self.among(passage, number, None)[0])
                for (passage, n, question, _), number in zip(self.questions("unanswerable", size, most), others, strict=True)]

    def cut(self, reading: Sequence[dict], size: int, with_others: int) -> list[dict]:
        """Partners of answerable examples: the same but for the gold sentence; `with_others` of them have distractors."""
        rows: list[dict] = []
        left = [size - with_others, with_others]
        for record in self.rng.sample(reading, len(reading)):
            passages, several = list(record["passages"]), len(record["passages"]) > 1
            gold = passages[record["gold"] - 1]
            text = _without_answer(gold, record["answer"])
            if text and left[several]:
                left[several] -= 1
                passages[record["gold"] - 1] = {"title": gold["title"], "text": text}
                rows.append(_record(record["id"].replace("reading", "cut", 1), "unanswerable", record["question"], passages))
        if any(left):
            raise ValueError(f"{size - sum(left)} of {size} minimal pairs could be made")
        return rows

    def alone(self, size: int, most: int) -> list[dict]:
        return [_record(f"alone-{passage.id}-{n}", "no passage", question)
                for passage, n, question, _ in self.questions("reading", size, most)]


def _block(passage: Passage) -> dict[str, str]:
    return {"title": plain(passage.title), "text": plain(passage.text)}


def _stands(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def _without_answer(block: dict[str, str], answer: str) -> str | None:
    """The text without its gold sentence, or None where what is left (or the title) might still give the answer away."""
    if re.match(r"(Yes|No)\b", answer) or _OTHER_STOP.search(block["text"]):
        return None
    text = without_gold_sentence(block["text"], answer)
    rest = f"{block['title']} {text}"
    words = re.findall(r"[\w'’-]+", answer)
    telling = [w for w in words if any(c.isdigit() or c.isupper() for c in w)]
    long = [w for w in words if len(w) > 3] or words
    if text is None or any(_stands(form, rest) for form in [answer, *other_forms(answer)]) or any(
            _stands(w, rest) for w in telling) or all(_stands(w, rest) for w in long):
        return None
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text if "\n " in block["text"] else text.replace("\n ", "\n")  # no trace of where the sentence stood


# ------------------------------------------------------------------------------------------------------------- the files

def _replay(size: dict[str, int], taken: set[str]) -> list[dict]:
    short = [p for p in load_split("train") if len(plain(p.text).split()) <= MAX_WORDS]
    draw = _Passages(short, "replay", taken)

    def others(n: int) -> list[int]:  # 30 % with distractors: half of these with one, half with two
        return [1] * (n * 15 // 100) + [2] * (n * 15 // 100) + [0] * (n - 2 * (n * 15 // 100))

    half = size["unanswerable"] // 2
    reading = draw.reading(size["reading"], others(size["reading"]), most=1)
    return [*reading, *draw.tempting(half, others(half), most=1),
            *draw.cut(reading, size["unanswerable"] - half, with_others=(size["unanswerable"] - half) * 30 // 100),
            *draw.alone(size["no passage"], most=1)]


def _held_out(size: dict[str, int]) -> list[dict]:
    draw = _Passages(load_split("development"), "held out", set())
    half = size["unanswerable"] // 2
    reading = draw.reading(size["reading"], [1] * size["reading"], most=3)
    return [*reading, *draw.tempting(half, [1] * half, most=4),
            *draw.cut(reading, size["unanswerable"] - half, with_others=size["unanswerable"] - half),
            *draw.alone(size["no passage"], most=5)]


def build() -> dict[str, str]:
    """The text of each file, by name."""
    facts = _facts({name: COUNTS[name]["fact"] for name in FILES})
    reserved = {same_question(plain(q)) for split in ("development", "test") for p in load_split(split)
                for q in (*(q for q, _ in p.questions), *p.unanswerable)}
    rows = {"replay": facts["replay"] + _replay(COUNTS["replay"], reserved),
            "held_out": facts["held_out"] + _held_out(COUNTS["held_out"])}
    for name in FILES:
        found = Counter(row["kind"] for row in rows[name])
        if found != COUNTS[name]:
            raise ValueError(f"{name}: expected {COUNTS[name]}, made {dict(found)}")
        random.Random(f"{SEED}-order-{name}").shuffle(rows[name])  # so that the first n rows are a fair mixture
    return {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]) for name in FILES}


def write(texts: dict[str, str], folder: Path = TARGET) -> None:
    """Write each file whole: first under a temporary name, then in place."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = folder / f"{name}.jsonl.part"
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, folder / f"{name}.jsonl")


def counts(text: str) -> str:
    """One line about a file: examples of each kind, size, mean words of a prompt."""
    rows = [json.loads(line) for line in text.splitlines()]
    kinds = Counter(row["kind"] for row in rows)
    words = [len(" ".join([r["question"], *(f"{p['title']} {p['text']}" for p in r["passages"])]).split()) for r in rows]
    return (f"{len(rows)} examples ({', '.join(f'{kind} {kinds[kind]}' for kind in COUNTS['replay'])}), "
            f"{len(text.encode()) / 1000:.0f} kB, {sum(words) / len(words):.0f} words a prompt")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write to (default: data/general)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the files differ")
    args = parser.parse_args(arguments)
    texts = build()
    if args.check:
        files = {name: args.target / f"{name}.jsonl" for name in FILES}
        different = [str(file) for name, file in files.items()
                     if not file.exists() or file.read_bytes() != texts[name].encode()]
        if different:
            print(f"not what the program writes: {', '.join(different)}; run: python -m data.build.general.build",
                  file=sys.stderr)
        return 1 if different else 0
    write(texts, args.target)
    for name in FILES:
        print(f"{name}.jsonl: {counts(texts[name])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
