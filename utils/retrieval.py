"""From a question to chunks: by keywords, by meaning, and by both, each as a LlamaIndex retriever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import bm25s
import numpy as np
import Stemmer
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.retrievers import QueryFusionRetriever, VectorIndexRetriever
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from tqdm.auto import tqdm

from .corpus import Corpus, load_folder, make_splitter, snapshot_folder
from .embedding import CourseEmbedding
from .vector_store import FaissStore

__all__ = ["KeywordRetriever", "HybridRetriever", "SearchEngine", "dense_retriever", "plain_fusion_retriever", "build_index",
           "fuse", "rank_all", "brute_force", "search_engine"]


class KeywordRetriever(BaseRetriever):
    """BM25 (Robertson & Zaragoza 2009) over chunks, computed by bm25s (Lù 2024).

    Parameters
    ----------
    nodes : the chunks; their text with the metadata that the embedder also sees is indexed.
    top_k : how many chunks to return; chunks that share no word with the question are never returned.
    """

    def __init__(self, nodes: Sequence[BaseNode], top_k: int = 10):
        if not nodes:
            raise ValueError("KeywordRetriever got no chunks; expected at least one. Load and chunk documents first.")
        super().__init__()
        self._nodes, self.top_k = list(nodes), top_k
        self._stemmer = Stemmer.Stemmer("english")
        self._index = bm25s.BM25()
        self._index.index(self._tokens([n.get_content(MetadataMode.EMBED) for n in self._nodes]), show_progress=False)

    def _tokens(self, texts: list[str]):
        return bm25s.tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        tokens = self._tokens([query_bundle.query_str])
        if not tokens.vocab:
            return []
        found, scores = self._index.retrieve(tokens, k=min(self.top_k, len(self._nodes)), show_progress=False)
        return [NodeWithScore(node=self._nodes[i], score=float(s)) for i, s in zip(found[0], scores[0]) if s > 0]


def build_index(nodes: Sequence[BaseNode], embedder: BaseEmbedding, store: FaissStore | None = None) -> VectorStoreIndex:
    """Embed the chunks and put them into a FAISS store; returns the LlamaIndex index on top of it."""
    nodes = list(nodes)
    texts = [n.get_content(MetadataMode.EMBED) for n in nodes]
    vectors = embedder.encode(texts) if hasattr(embedder, "encode") else embedder.get_text_embedding_batch(texts)
    for node, vector in zip(nodes, vectors):
        node.embedding = list(map(float, vector))
    if store is None:
        store = FaissStore(dimension=len(nodes[0].embedding))
    store.add(nodes)
    return VectorStoreIndex.from_vector_store(store, embed_model=embedder)


def dense_retriever(index: VectorStoreIndex, top_k: int = 10, **kwargs) -> VectorIndexRetriever:
    """The `top_k` chunks whose vectors are nearest to the question's."""
    return VectorIndexRetriever(index, similarity_top_k=top_k, **kwargs)


class HybridRetriever(BaseRetriever):
    """Two rankings merged by weighted reciprocal rank fusion (Cormack, Clarke & Buettcher 2009).

    A chunk's score is the sum of weight / (constant + rank) over the rankings in which it stands. LlamaIndex's
    `QueryFusionRetriever` knows only equal weights and the constant 60, with which a weak ranking drags a good one down.

    Parameters
    ----------
    keyword, dense : retrievers that return more chunks than `top_k`, 50 say.
    weight : of the keyword ranking; the dense one has 1 - weight. The defaults were tuned on the training wordings
        (lesson 01).
    constant : the larger, the less the first places count.
    """

    def __init__(self, keyword: BaseRetriever, dense: BaseRetriever, top_k: int = 10, weight: float = 0.4,
                 constant: float = 10.0):
        if not 0 <= weight <= 1 or constant <= 0:
            raise ValueError(f"weight is {weight} and constant {constant}; expected 0 <= weight <= 1 and constant > 0")
        super().__init__()
        self.keyword, self.dense, self.top_k, self.weight, self.constant = keyword, dense, top_k, weight, constant

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return fuse(self.keyword.retrieve(query_bundle), self.dense.retrieve(query_bundle), self.top_k, self.weight,
                    self.constant)


def fuse(keyword: Sequence[NodeWithScore], dense: Sequence[NodeWithScore], top_k: int = 10, weight: float = 0.4,
         constant: float = 10.0) -> list[NodeWithScore]:
    """One merged ranking of `top_k` chunks; equal scores keep the order in which they were met, dense first."""
    nodes, scores = {}, {}
    for ranking, share in ((dense, 1 - weight), (keyword, weight)):
        for rank, hit in enumerate(ranking, 1):
            nodes[hit.node.node_id] = hit.node
            scores[hit.node.node_id] = scores.get(hit.node.node_id, 0.0) + share / (constant + rank)
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:top_k]
    return [NodeWithScore(node=nodes[name], score=scores[name]) for name in best]


def plain_fusion_retriever(keyword: BaseRetriever, dense: BaseRetriever, top_k: int = 10) -> QueryFusionRetriever:
    """LlamaIndex's own reciprocal rank fusion: equal weights, constant 60, and here without any LLM call.

    Its default would ask an LLM for four rewordings of the question; `num_queries=1` switches that off.
    """
    return QueryFusionRetriever([keyword, dense], llm=MockLLM(), num_queries=1, similarity_top_k=top_k,
                                mode="reciprocal_rerank", use_async=False)


def rank_all(retriever: BaseRetriever, questions: Sequence[str], embedder: BaseEmbedding | None = None,
             label: str = "retrieving") -> list[list[NodeWithScore]]:
    """Ranked chunks of every question. With an `embedder` that caches, all questions are embedded in one go first."""
    if embedder is not None and hasattr(embedder, "encode"):
        embedder.encode(list(questions), label="embedding questions")
    return [retriever.retrieve(q) for q in tqdm(questions, desc=label, unit="question", leave=False)]


def brute_force(question_vectors: np.ndarray, chunk_vectors: np.ndarray, top_k: int = 10) -> np.ndarray:
    """Exact search in NumPy: indices of the `top_k` largest inner products, shape (questions, top_k)."""
    scores = question_vectors @ chunk_vectors.T
    top_k = min(top_k, scores.shape[1])
    part = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    order = np.argsort(-np.take_along_axis(scores, part, 1), axis=1, kind="stable")
    return np.take_along_axis(part, order, 1)


@dataclass(frozen=True)
class SearchEngine:
    """A searchable snapshot: its documents, chunks and the three retrievers of lesson 01."""

    corpus: Corpus
    nodes: list[BaseNode]
    index: VectorStoreIndex
    keyword: KeywordRetriever
    dense: VectorIndexRetriever
    hybrid: HybridRetriever


def search_engine(snapshot: str, embedder: CourseEmbedding | None = None, chunk_size: int = 128, chunk_overlap: int = 32,
                  depth: int = 50, top_k: int = 20) -> SearchEngine:
    """Load, cut and index a snapshot ("2026-04-01" or "2026-10-01"), as lesson 01 does by hand.

    depth : chunks that each of the two retrievers hands to the hybrid one, which returns `top_k`.
    """
    embedder = embedder or CourseEmbedding()
    corpus = load_folder(snapshot_folder(snapshot))
    nodes = make_splitter(chunk_size, chunk_overlap, embedder.count_tokens).get_nodes_from_documents(corpus.documents)
    index = build_index(nodes, embedder)
    keyword, dense = KeywordRetriever(nodes, top_k=depth), dense_retriever(index, top_k=depth)
    return SearchEngine(corpus, nodes, index, keyword, dense, HybridRetriever(keyword, dense, top_k=top_k))
