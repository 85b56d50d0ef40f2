"""Measuring retrieval: which chunks hold the answer, how early they are found, and how sure we can be.

Metrics come from ir-measures. Intervals are bootstrap intervals over facts, not over questions: the wordings of one
fact succeed and fail together, so counting them as independent would promise more certainty than there is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
from ir_measures import RR, R, nDCG
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from .settings import DATA

__all__ = ["Fact", "Question", "load_facts", "load_questions", "relevant_chunks", "retrieval_scores", "Interval",
           "bootstrap", "compare", "RETRIEVAL_METRICS", "squeeze"]

RETRIEVAL_METRICS = {"recall@1": R @ 1, "recall@3": R @ 3, "recall@5": R @ 5, "recall@10": R @ 10, "MRR@10": RR @ 10,
                     "nDCG@10": nDCG @ 10}


@dataclass(frozen=True)
class Fact:
    """One line of the ledger as it holds in one snapshot."""

    id: str
    entity: str
    attribute: str
    value: str
    document: str
    evidence: str
    also: tuple[str, ...]
    asked: bool
    changed: bool
    superseded: Mapping[str, str] | None
    access_group: str


@dataclass(frozen=True)
class Question:
    """One wording of the question for a fact."""

    id: str
    fact: str
    wording: int
    split: str
    text: str
    kind: str
    shared: float
    few_shared: bool


def read_jsonl(path: Path) -> list[dict]:
    """Records of a JSON-lines file. Raises FileNotFoundError with the remedy, ValueError with file and line."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. It is part of the repository; restore it with: git checkout -- {path.name}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
    return records


def load_facts(snapshot: str, folder: Path = DATA / "questions") -> dict[str, Fact]:
    """The facts that hold in a snapshot ("2026-04-01" or "2026-10-01"), by id."""
    facts = {}
    for row in read_jsonl(folder / "facts.jsonl"):
        for version in row["versions"]:
            if version["snapshot"] == snapshot:
                first = version["value"] == row["versions"][0]["value"]  # `also` holds other forms of the first value
                facts[row["id"]] = Fact(row["id"], row["entity"], row["attribute"], version["value"], version["document"],
                                        version["evidence"], tuple(row["also"]) if first else (), row["asked"],
                                        row["changed"], row["superseded"], row["access_group"])
    if not facts:
        raise ValueError(f"no fact holds in snapshot '{snapshot}'; expected one of the folders of data/knowledge_base")
    return facts


def load_questions(split: str, snapshot: str, folder: Path = DATA / "questions") -> list[Question]:
    """Questions of a split ("train" or "held_out") about facts that hold in the snapshot."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'held_out'")
    facts = load_facts(snapshot, folder)
    return [Question(**{k: row[k] for k in Question.__dataclass_fields__})
            for row in read_jsonl(folder / "questions.jsonl") if row["split"] == split and row["fact"] in facts]


@lru_cache(maxsize=100_000)
def squeeze(text: str) -> str:
    """Only letters and digits, in small letters: the same for a Markdown table and the text a PDF reader makes of it."""
    return re.sub(r"[\W_]+", "", text.lower())


def relevant_chunks(facts: Mapping[str, Fact], nodes: Sequence[BaseNode]) -> dict[str, set[str]]:
    """Ids of the chunks in which each fact can be read.

    A chunk is relevant if it holds the fact's whole evidence; where the splitter cut through the evidence, the chunks of
    that document that hold the value and most of the evidence's words are.
    """
    by_document: dict[str, list[tuple[str, str, str]]] = {}
    for node in nodes:
        text = node.get_content(MetadataMode.NONE)
        by_document.setdefault(node.metadata["id"], []).append((node.node_id, squeeze(text), text.lower()))
    relevant = {}
    for fact in facts.values():
        chunks = by_document.get(fact.document, [])
        found = {i for i, squeezed, _ in chunks if squeeze(fact.evidence) in squeezed}
        if not found:
            words = set(re.findall(r"\w+", fact.evidence.lower()))
            shares = {i: len(words & set(re.findall(r"\w+", text))) / max(1, len(words))
                      for i, squeezed, text in chunks if squeeze(fact.value) in squeezed}
            best = max(shares.values(), default=0.0)
            found = {i for i, share in shares.items() if share == best}
        relevant[fact.id] = found
    return relevant


def retrieval_scores(rankings: Sequence[Sequence[NodeWithScore]], questions: Sequence[Question],
                     relevant: Mapping[str, set[str]]) -> pd.DataFrame:
    """One row a question, one column a metric (0 to 1), with `fact` and `few_shared` beside them.

    Questions whose fact has several relevant chunks (an overlap) count as found when any of them is: the run keeps only
    the first relevant chunk, so that recall is 1 as soon as the answer can be read.
    """
    qrels, run = [], []
    for ranking, question in zip(rankings, questions, strict=True):
        wanted = relevant[question.fact]
        qrels.append(ir_measures.Qrel(question.id, "answer", 1))
        seen = False
        for place, hit in enumerate(ranking):
            name = hit.node.node_id
            if name in wanted:
                if seen:
                    continue
                seen, name = True, "answer"
            run.append(ir_measures.ScoredDoc(question.id, name, float(-place)))
    table: dict[str, dict[str, float]] = {q.id: dict.fromkeys(RETRIEVAL_METRICS, 0.0) for q in questions}
    names = {measure: name for name, measure in RETRIEVAL_METRICS.items()}
    for metric in ir_measures.iter_calc(list(RETRIEVAL_METRICS.values()), qrels, run):
        table[metric.query_id][names[metric.measure]] = metric.value
    frame = pd.DataFrame([table[q.id] for q in questions], index=[q.id for q in questions])
    frame.insert(0, "fact", [q.fact for q in questions])
    frame.insert(1, "few_shared", [q.few_shared for q in questions])
    return frame


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def percent(self, digits: int = 1) -> str:
        """As per cent, for tables and prose."""
        return f"{100 * self.mean:.{digits}f} % [{100 * self.low:.{digits}f}, {100 * self.high:.{digits}f}]"

    def points(self, digits: int = 1) -> str:
        """A difference of two shares, in signed percentage points."""
        return f"{100 * self.mean:+.{digits}f} [{100 * self.low:+.{digits}f}, {100 * self.high:+.{digits}f}]"


def _resampled_means(values: np.ndarray, groups: Sequence, resamples: int, seed: int) -> np.ndarray:
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    size = member.max() + 1
    sums, counts = np.bincount(member, values, size), np.bincount(member, minlength=size)
    draws = np.random.default_rng(seed).integers(0, size, (resamples, size))
    return sums[draws].sum(1) / counts[draws].sum(1)


def bootstrap(values: Sequence[float], facts: Sequence, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` with a percentile bootstrap interval (Efron 1979) that redraws whole facts."""
    values = np.asarray(values, float)
    if len(values) == 0:
        raise ValueError("bootstrap() got no values; expected one value a question")
    low, high = np.percentile(_resampled_means(values, facts, resamples, seed), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def compare(first: Sequence[float], second: Sequence[float], facts: Sequence, resamples: int = 2000,
            seed: int = 0) -> tuple[Interval, str]:
    """The paired difference first - second with its interval, and a verdict: "first", "second" or "cannot tell"."""
    difference = bootstrap(np.asarray(first, float) - np.asarray(second, float), facts, resamples, seed)
    verdict = "first" if difference.low > 0 else "second" if difference.high < 0 else "cannot tell"
    return difference, verdict
