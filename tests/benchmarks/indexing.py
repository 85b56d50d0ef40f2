"""How much faster is our index building than LlamaIndex's quickstart, and does it find the same?

    python -m tests.benchmarks.indexing

Both run in this process on the same chunks, turn by turn, `--rounds` times; what counts is the ratio of the medians, since
seconds differ from machine to machine (and other programs on the same cores disturb both). Then the rankings are compared
with plain sentence-transformers in float32 and exact search: two chunks whose exact scores differ by less than `TIE` count
as tied (bfloat16 numbers near 0.5 are 0.002 to 0.004 apart). Wanted are a ratio of `RATIO` and an agreement of `AGREEMENT`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from utils.settings import banner, settings

import numpy as np
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from sentence_transformers import SentenceTransformer

from utils import embedding as embedding_module
from utils.corpus import load_folder, make_splitter, snapshot_folder
from utils.embedding import CourseEmbedding, embedder_folder
from utils.evaluation import load_questions
from utils.retrieval import brute_force, build_index, dense_retriever, rank_all

TIE = 0.002
RATIO, AGREEMENT = 3.0, 99.5


def quickstart(nodes: list[TextNode], embedding: HuggingFaceEmbedding) -> float:
    """Seconds of `VectorStoreIndex(nodes, embed_model=HuggingFaceEmbedding(...))`."""
    begin = time.perf_counter()
    VectorStoreIndex(nodes, embed_model=embedding)
    return time.perf_counter() - begin


def ours(nodes: list[TextNode], embedding: CourseEmbedding) -> float:
    """Seconds of `build_index`, without the cache on disk."""
    begin = time.perf_counter()
    build_index(nodes, embedding)
    return time.perf_counter() - begin


def fresh(nodes: list[TextNode]) -> list[TextNode]:
    """Copies without embeddings."""
    return [n.model_copy(update={"embedding": None}) for n in nodes]


def same_top(exact_scores: np.ndarray, found: np.ndarray, tie: float) -> np.ndarray:
    """For each question: are all found chunks in the exact top list, or tied with its last place?

    exact_scores : (questions, chunks); found : (questions, k) indices.
    """
    last = np.sort(exact_scores, axis=1)[:, -found.shape[1]]
    return (np.take_along_axis(exact_scores, found, 1) >= last[:, None] - tie).all(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=0, help="0: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        embedding_module.WORK = Path(folder)  # no vectors of earlier runs
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Both figures, printed as JSON and as one line."""
    corpus = load_folder(snapshot_folder("2026-04-01"))
    embedder = CourseEmbedding(cache=False, progress=False)
    nodes = make_splitter(128, 32, embedder.count_tokens).get_nodes_from_documents(corpus.documents)
    theirs = HuggingFaceEmbedding(model_name=embedder_folder("minilm"), device="cpu")
    times: dict[str, list[float]] = {"quickstart": [], "ours": []}
    quickstart(fresh(nodes[:32]), theirs)
    ours(fresh(nodes[:32]), embedder)
    for _ in range(args.rounds):
        times["quickstart"].append(quickstart(fresh(nodes), theirs))
        times["ours"].append(ours(fresh(nodes), embedder))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {"chunks": len(nodes), "precision": embedder.precision,
              "quickstart_chunks_per_second": round(len(nodes) / medians["quickstart"], 1),
              "ours_chunks_per_second": round(len(nodes) / medians["ours"], 1),
              "ratio": round(medians["quickstart"] / medians["ours"], 2),
              "ratios": [round(a / b, 2) for a, b in zip(times["quickstart"], times["ours"])]}

    texts = [n.get_content(MetadataMode.EMBED) for n in nodes]
    questions = [q.text for q in load_questions("held_out", "2026-04-01")][: args.questions or None]
    plain = SentenceTransformer(embedder_folder("minilm"), device="cpu")
    chunk_vectors, question_vectors = (plain.encode(x, batch_size=64, normalize_embeddings=True) for x in (texts, questions))
    exact = question_vectors @ chunk_vectors.T
    position = {n.node_id: i for i, n in enumerate(nodes)}
    for precision in ("float32", embedder.precision):
        model = CourseEmbedding(precision=precision, cache=True, progress=False)
        retriever = dense_retriever(build_index(fresh(nodes), model), top_k=10)
        found = np.array([[position[h.node.node_id] for h in hits] for hits in rank_all(retriever, questions, model)])
        result[f"same_top10_percent_{precision}"] = {
            f"ties within {tie}": round(100 * same_top(exact, found, tie).mean(), 2) for tie in (1e-6, 1e-3, TIE)}
        result[f"same_order_percent_{precision}"] = round(
            100 * (found == brute_force(question_vectors, chunk_vectors, 10)).all(axis=1).mean(), 2)
    result["questions"] = len(questions)
    print(json.dumps(result, indent=1))
    agreement = result[f"same_top10_percent_{embedder.precision}"][f"ties within {TIE}"]
    print(f"ratio: {result['ratio']} (ours / quickstart, chunks a second; wanted {RATIO}) · agreement: {agreement} % of "
          f"{len(questions)} top-10s (wanted {AGREEMENT}) · {banner()} · {settings.threads} threads")


if __name__ == "__main__":
    main()
