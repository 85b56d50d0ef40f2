"""FaissStore: unit tests, the LlamaIndex pipeline, damage on disk, and a long random comparison with a plain dict.

`COURSE_OPERATIONS=10000 pytest tests/test_vector_store.py -s` makes the random comparison that much longer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test)

from utils.vector_store import INDEX, MANIFEST, NODES, FaissStore, StoreError

import faiss  # after utils, which imports torch first
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.schema import Document, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.simple import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    FilterCondition, FilterOperator, MetadataFilter, MetadataFilters, VectorStoreQuery, VectorStoreQueryMode)

OPERATIONS = int(os.environ.get("COURSE_OPERATIONS", "500"))
DIMENSION = 4
FILES = (INDEX, NODES, MANIFEST)


def chunk(node_id: str, vector, document: str | None = None, **metadata) -> TextNode:
    node = TextNode(id_=node_id, text=f"text of {node_id}", metadata=metadata, embedding=list(vector))
    if document is not None:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return node


def where(key, value, operator="==") -> MetadataFilter:
    return MetadataFilter(key=key, value=value, operator=FilterOperator(operator))


def filters(*parts, condition="and") -> MetadataFilters:
    return MetadataFilters(filters=list(parts), condition=FilterCondition(condition))


def ask(store: FaissStore, vector, top_k: int = 10, **kwargs) -> list[str]:
    return store.query(VectorStoreQuery(query_embedding=list(vector), similarity_top_k=top_k, **kwargs)).ids


def contents(store: FaissStore) -> dict:
    """Everything a store holds, to compare before with after."""
    numbers = faiss.vector_to_array(store.client.id_map).tolist()
    assert numbers == list(store._chunks) and store._numbers == {c.node_id: n for n, c in store._chunks.items()}
    vectors = [store.client.reconstruct(number).tolist() for number in numbers]
    return {"next": store._next, "chunks": dict(store._chunks), "vectors": dict(zip(numbers, vectors))}


@pytest.fixture
def store() -> FaissStore:
    """Two documents of two chunks each, and a node without a document."""
    store = FaissStore(DIMENSION)
    store.add([chunk("a1", (1, 0, 0, 0), "A", colour="red", size=1),
               chunk("a2", (0, 1, 0, 0), "A", colour="blue", size=2),
               chunk("b1", (1, 1, 0, 0), "B", colour="red", size=3), chunk("b2", (0, 0, 1, 0), "B", colour="Grün"),
               chunk("c", (-1, 0, 0, 0), None, size=5)])
    return store


# ---- adding, replacing, removing

def test_add_returns_ids_and_keeps_text_and_metadata(store):
    assert len(store) == store.client.ntotal == 5
    node = store.get_nodes(["b2"])[0]
    assert (node.text, node.metadata, node.ref_doc_id) == ("text of b2", {"colour": "Grün"}, "B")
    assert node.hash == chunk("b2", (0, 0, 1, 0), "B", colour="Grün").hash
    assert store.add([]) == [] and store.add([chunk("d", (0, 0, 0, 2))]) == ["d"]


def test_stored_nodes_are_copies(store):
    node = chunk("d", (0, 0, 0, 1), "D", colour="red")
    store.add([node])
    node.metadata["colour"] = "blue"
    store.get_nodes(["d"])[0].metadata["colour"] = "blue"
    assert store.get_nodes(["d"])[0].metadata == {"colour": "red"}


@pytest.mark.parametrize("bad, says", [
    (chunk("a1", (1, 0, 0, 0)), "use upsert"),
    (chunk("x", (1, 0, 0)), r"shape \(3,\); expected \(4,\)"),
    (chunk("x", (0, 0, 0, 0)), "zero or not finite"),
    (chunk("x", (math.nan, 0, 0, 1)), "zero or not finite"),
    (chunk("x", (math.inf, 0, 0, 1)), "zero or not finite"),
    (TextNode(id_="x", text="t"), "has no embedding"),
    (chunk("fine", (1, 0, 0, 0)), "more than once"),
    (chunk("x", (1, 0, 0, 0), tags=["a", "b"]), "'x' has metadata that cannot be filtered"),
])
def test_a_refused_add_or_upsert_changes_nothing(store, bad, says):
    before = contents(store)
    with pytest.raises(ValueError, match=says):
        store.add([chunk("fine", (0, 0, 0, 1)), bad])
    assert contents(store) == before
    if bad.node_id != "a1":
        with pytest.raises(ValueError, match=says):
            store.upsert([chunk("fine", (0, 0, 0, 1), "A"), bad])
        assert contents(store) == before


@pytest.mark.parametrize("vector", [(1e300, 1e300, 0, 0), (1e-310, 1e-310, 0, 0), (7, 7, 0, 0)])
def test_vectors_of_any_length_are_scaled(vector):
    store = FaissStore(DIMENSION)
    store.add([chunk("a", vector)])
    assert store.query(VectorStoreQuery(query_embedding=[2, 2, 0, 0])).similarities == pytest.approx([1], abs=1e-6)


@pytest.mark.parametrize("dimension", [0, -1, 2.0, True, "4", None, 10 ** 9])
def test_impossible_dimension(dimension):
    with pytest.raises(ValueError, match="whole number"):
        FaissStore(dimension)


def test_upsert_replaces_whole_documents(store):
    assert store.upsert([chunk("a3", (0, 0, 0, 1), "A")]) == ["a3"]
    assert [node.node_id for node in store.get_nodes()] == ["b1", "b2", "c", "a3"]
    store.upsert([chunk("b1", (0, 0, 0, 1), "B"), chunk("c", (0, 0, 0, 1)), chunk("n", (0, 0, 0, 1), "N")])
    assert [node.node_id for node in store.get_nodes()] == ["a3", "b1", "c", "n"]
    assert ask(store, (0, 0, 0, 1)) == ["a3", "b1", "c", "n"] and store.client.ntotal == 4
    assert store.upsert([]) == []


def test_upsert_moves_a_node_id_to_another_document(store):
    store.upsert([chunk("a1", (0, 0, 0, 1), "B")])
    assert [(node.node_id, node.ref_doc_id) for node in store.get_nodes()] == [("a2", "A"), ("c", None), ("a1", "B")]


def test_delete(store):
    store.delete("A")
    store.delete("unknown")
    assert ask(store, (1, 1, 0, 0)) == ["b1", "b2", "c"]
    store.delete("c")  # a node without ref_doc_id is its own document
    assert [node.node_id for node in store.get_nodes()] == ["b1", "b2"]


def test_delete_nodes(store):
    store.delete_nodes(["a1", "unknown"])
    store.delete_nodes(["b1", "b2"], filters(where("colour", "red")))
    assert [node.node_id for node in store.get_nodes()] == ["a2", "b2", "c"]
    store.delete_nodes(filters=filters(where("ref_doc_id", "B")))
    store.delete_nodes([])
    assert [node.node_id for node in store.get_nodes()] == ["a2", "c"]
    for nothing in (None, MetadataFilters(filters=[])):
        with pytest.raises(ValueError, match="clear()"):
            store.delete_nodes(filters=nothing)


def test_numbers_are_never_used_twice(store, tmp_path):
    store.delete("B")
    store.delete("c")
    store.clear()
    assert len(store) == 0 == store.client.ntotal
    store.persist(tmp_path / "s")
    store = FaissStore.load(tmp_path / "s")
    store.add([chunk("a1", (1, 0, 0, 0))])
    assert list(store._chunks) == [5] and ask(store, (1, 0, 0, 0)) == ["a1"]


# ---- finding

def test_query_returns_nodes_ids_and_float_cosines(store):
    result = store.query(VectorStoreQuery(query_embedding=[3, 0, 0, 0], similarity_top_k=3))
    assert result.ids == [node.node_id for node in result.nodes] == ["a1", "b1", "a2"]
    assert result.similarities == pytest.approx([1, 2 ** -0.5, 0], abs=1e-6)
    assert all(type(value) is float for value in result.similarities)
    assert len(ask(store, (1, 0, 0, 0), 1000)) == 5


def test_query_conditions(store):
    assert ask(store, (1, 0, 0, 0), node_ids=["a2", "c", "unknown"]) == ["a2", "c"]
    assert ask(store, (1, 0, 0, 0), doc_ids=["B", "c"]) == ["b1", "b2", "c"]
    assert ask(store, (1, 0, 0, 0), doc_ids=["A"], filters=filters(where("colour", "red"))) == ["a1"]
    assert ask(store, (1, 1, 0, 0), node_ids=[])[0] == "b1", "what index.as_retriever() passes for 'all'"
    for nothing in ({"node_ids": ["unknown"]}, {"doc_ids": []}, {"filters": filters(where("colour", "pink"))}):
        assert ask(store, (1, 0, 0, 0), **nothing) == []
    assert ask(FaissStore(DIMENSION), (1, 0, 0, 0)) == []


def test_a_filter_finds_its_only_match_behind_a_thousand_better_chunks():
    store = FaissStore(DIMENSION)
    store.add([chunk(f"near{i}", (1, 0, 0, i / 1000), colour="red") for i in range(1000)]
              + [chunk("far", (-1, 0, 0, 0), colour="blue")])
    assert ask(store, (1, 0, 0, 0), 5, filters=filters(where("colour", "blue"))) == ["far"]


@pytest.mark.parametrize("part, expected", [
    (where("colour", "red"), "a1 b1"), (where("colour", "red", "!="), "a2 b2 c"), (where("size", 2, ">"), "b1 c"),
    (where("size", 2, ">="), "a2 b1 c"), (where("size", 2, "<"), "a1"), (where("size", 2, "<="), "a1 a2"),
    (where("colour", ["red", "blue"], "in"), "a1 a2 b1"), (where("colour", ["red", "blue"], "nin"), "b2 c"),
    (where("colour", ["r", "ü"], "any"), "a1 b1 b2"), (where("colour", ["r", "e"], "all"), "a1 b1"),
    (where("colour", "rü", "text_match"), "b2"), (where("colour", "RÜ", "text_match"), ""),
    (where("colour", "RÜ", "text_match_insensitive"), "b2"), (where("colour", "lu", "contains"), "a2"),
    (where("colour", None, "is_empty"), "c"), (where("doc_id", "A"), "a1 a2"),
    (filters(where("colour", "red"), where("size", 1, ">"), condition="and"), "b1"),
    (filters(where("colour", "blue"), where("size", 5), condition="or"), "a2 c"),
    (filters(where("colour", "red"), where("size", 5), condition="not"), "a2 b2"),
    (filters(filters(where("colour", "red"), where("size", 5), condition="or"),
             filters(where("size", 2, "<"), condition="not")), "b1 c"),
    (filters(filters(filters(where("colour", "red"), condition="not"), condition="not")), "a1 b1"),
    (MetadataFilters(filters=[]), "a1 a2 b1 b2 c"),
])
def test_every_operator_and_condition(store, part, expected):
    whole = part if isinstance(part, MetadataFilters) else filters(part)
    assert sorted(ask(store, (1, 2, 3, 4), filters=whole)) == expected.split()
    assert [node.node_id for node in store.get_nodes(filters=whole)] == expected.split()
    if not any(isinstance(inner, MetadataFilters) for inner in whole.filters):  # LlamaIndex's own store agrees
        simple = SimpleVectorStore()
        simple.add([node.model_copy(update={"embedding": [1.0]}) for node in store.get_nodes()])
        found = simple.query(VectorStoreQuery(query_embedding=[1.0], similarity_top_k=9, filters=whole)).ids
        assert sorted(found) == expected.split()


def test_a_filter_that_does_not_fit_says_so(store):
    with pytest.raises(TypeError, match="key='size'.*Compare text with text"):
        ask(store, (1, 0, 0, 0), filters=filters(where("size", "2", ">")))


def test_ties_go_by_insertion_also_at_the_cut():
    store = FaissStore(DIMENSION)
    names = [f"n{(7 * i) % 40:02d}" for i in range(40)]
    store.add([chunk(name, (1, 2, 3, 4), even=i % 2) for i, name in enumerate(names)])
    for top_k in (1, 5, 39, 40):
        assert ask(store, (4, 3, 2, 1), top_k) == names[:top_k]
        assert ask(store, (4, 3, 2, 1), top_k, filters=filters(where("even", 0))) == names[::2][:top_k]
    store.upsert([chunk(names[0], (1, 2, 3, 4))])  # now the youngest
    assert ask(store, (4, 3, 2, 1), 40) == names[1:] + names[:1]


def test_search_is_exact_among_near_duplicates():
    """Half of the chunks are copies, and their neighbours lie within float32 rounding."""
    random = np.random.default_rng(0)
    base = random.normal(size=384)
    rows = np.repeat([base + random.normal(size=384) * 10.0 ** -random.integers(1, 8) for _ in range(300)], 2, axis=0)
    store = FaissStore(384)
    store.add([chunk(f"n{i}", row, size=i % 3) for i, row in enumerate(rows)])
    stored = store.client.reconstruct_n(0, 600).astype(np.float64)
    for _ in range(5):
        question = base + random.normal(size=384) / 3
        unit = (question / np.linalg.norm(question)).astype(np.float32)
        scores = (stored * unit).sum(axis=1)
        order = np.argsort(-scores, kind="stable")
        assert ask(store, question, 51) == [f"n{i}" for i in order[:51]]
        expected = [f"n{i}" for i in order if i % 3 == 1]
        assert ask(store, question, 51, filters=filters(where("size", 1))) == expected[:51]


@pytest.mark.parametrize("query, says", [
    (dict(query_embedding=[1, 0, 0, 0], mode=VectorStoreQueryMode.MMR), "knows only VectorStoreQueryMode.DEFAULT"),
    (dict(query_embedding=[1, 0, 0, 0], similarity_top_k=0), "at least 1"),
    (dict(query_embedding=None), "The query has no embedding"),
    (dict(query_embedding=[1, 0]), "expected \\(4,\\)"),
    (dict(query_embedding=[0, 0, 0, 0]), "zero or not finite"),
])
def test_impossible_queries(store, query, says):
    with pytest.raises(ValueError, match=says):
        store.query(VectorStoreQuery(**query))


def test_ids_as_a_text_are_refused(store):
    for call in (store.get_nodes, store.delete_nodes, lambda ids: ask(store, (1, 0, 0, 0), doc_ids=ids)):
        with pytest.raises(TypeError, match=r"\['a1'\]"):
            call("a1")


# ---- with LlamaIndex

class WordHash(BaseEmbedding):
    """A mock: every word adds its own random direction."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return sum(np.random.default_rng(int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)).normal(size=32)
                   for word in text.lower().split() or ["?"]).tolist()

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def test_vector_store_index():
    store = FaissStore(32)
    index = VectorStoreIndex.from_vector_store(store, embed_model=WordHash())
    assert index.vector_store is store, "an empty store must not be taken for none"
    assert StorageContext.from_defaults(vector_store=store).vector_store is store
    index.insert_nodes([TextNode(id_=f"n{i}", text=text, metadata={"group": i % 2},
                                 relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"d{i}")})
                        for i, text in enumerate(["red lamp", "green lamp", "blue chair"])])
    found = index.as_retriever(similarity_top_k=2).retrieve("green lamp")
    assert [hit.node.node_id for hit in found][0] == "n1" and found[0].node.get_content() == "green lamp"
    assert isinstance(found[0].score, float) and found[0].node.ref_doc_id == "d1"
    only = filters(where("group", 0))
    assert {hit.node.node_id for hit in index.as_retriever(filters=only).retrieve("green lamp")} <= {"n0", "n2"}
    assert index.as_retriever(filters=filters(where("group", 7))).retrieve("green lamp") == []
    index.delete_ref_doc("d1")
    index.delete_nodes(["n2"])
    assert [node.node_id for node in store.get_nodes()] == ["n0"]


def pipeline(store: FaissStore, splitter: bool = True, strategy=DocstoreStrategy.UPSERTS) -> IngestionPipeline:
    parts = [TokenTextSplitter(chunk_size=60, chunk_overlap=0, tokenizer=list)] if splitter else []
    return IngestionPipeline(transformations=[*parts, WordHash()], vector_store=store, docstore=SimpleDocumentStore(),
                             docstore_strategy=strategy)


def words(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


def test_ingestion_pipeline_leaves_no_old_chunk(tmp_path):
    store = FaissStore(32)
    run = pipeline(store).run
    texts = {"one": words(0, 100), "two": words(200, 250)}

    def documents():
        return [Document(id_=name, text=text) for name, text in texts.items()]

    def stored(name):
        return " ".join(node.get_content() for node in store.get_nodes(filters=filters(where("ref_doc_id", name))))

    run(documents=documents())
    assert len(store) > 2 and stored("one") == texts["one"] and stored("two") == texts["two"]
    unchanged = contents(store)
    assert run(documents=documents()) == [] and contents(store) == unchanged
    for text in (words(500, 600), words(500, 502), words(0, 100)):  # changed, shrank, as it was
        texts["one"] = text
        run(documents=documents())
        assert stored("one") == text and stored("two") == texts["two"]
        assert {node.ref_doc_id for node in store.get_nodes()} == {"one", "two"}
        store.persist(tmp_path / "s")
        assert contents(FaissStore.load(tmp_path / "s")) == contents(store)


def test_ingestion_pipeline_without_a_splitter_and_with_deletes():
    store = FaissStore(32)
    run = pipeline(store, splitter=False, strategy=DocstoreStrategy.UPSERTS_AND_DELETE).run
    run(documents=[Document(id_="one", text="red lamp"), Document(id_="two", text="blue chair")])
    run(documents=[Document(id_="one", text="green lamp")])
    assert [(node.node_id, node.get_content()) for node in store.get_nodes()] == [("one", "green lamp")]


# ---- to disk and back

def test_persist_and_load(store, tmp_path):
    store.delete_nodes(["a2"])
    path = tmp_path / "Überführung 倉庫" / "läden"
    for _ in range(2):  # the second time over the first
        store.persist(path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert [file.name for file in path.parent.iterdir()] == ["läden"], "no leftovers"
    for load in (FaissStore.load, FaissStore.from_persist_path):
        loaded = load(str(path))
        assert contents(loaded) == contents(store) and loaded.get_nodes() == store.get_nodes()
    assert ask(loaded, (1, 2, 3, 4)) == ask(store, (1, 2, 3, 4))
    index = faiss.deserialize_index(np.frombuffer((path / INDEX).read_bytes(), np.uint8))  # a genuine FAISS file
    assert index.ntotal == 4 and index.reconstruct(2).tolist() == store.client.reconstruct(2).tolist()


def test_odd_texts_survive(tmp_path):
    text = "a\u2028b\x85c\r\nd\x00e \U0001f916\ud83e \"quotes\" \\ ünï"
    store = FaissStore(DIMENSION)
    store.add([TextNode(id_="x\n\u2028", text=text, metadata={"k": text, "n": None, "f": 0.1}, embedding=[1, 0, 0, 0])])
    store.persist(tmp_path / "s")
    node = FaissStore.load(tmp_path / "s").get_nodes()[0]
    assert (node.node_id, node.text, node.metadata) == ("x\n\u2028", text, {"k": text, "n": None, "f": 0.1})


def test_an_empty_store_persists(tmp_path):
    FaissStore(DIMENSION).persist(tmp_path)  # an empty folder may be taken
    assert len(FaissStore.load(tmp_path)) == 0


def rewrite(path: Path, name: str, change) -> None:
    """Change a file and give the manifest its new hash, as a forger would."""
    (path / name).write_bytes(change((path / name).read_bytes()))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))


def in_manifest(**values):
    def change(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**manifest, **values}))

    return change


@pytest.mark.parametrize("damage, says", [
    *[(lambda p, n=n: (p / n).unlink(), f"{n}: found no readable file") for n in FILES],
    *[(lambda p, n=n: os.truncate(p / n, (p / n).stat().st_size // 2), n) for n in FILES],
    *[(lambda p, n=n: os.truncate(p / n, 0), n) for n in FILES],
    *[(lambda p, n=n: (p / n).write_bytes((p / n).read_bytes() + b"x"), n) for n in FILES],
    (shutil.rmtree, f"{MANIFEST}: found no readable file"),
    (lambda p: (p / MANIFEST).write_text("[]"), MANIFEST), (lambda p: (p / MANIFEST).write_bytes(b"\xff{"), MANIFEST),
    (lambda p: (p / MANIFEST).write_text("[" * 100_000), MANIFEST),
    (in_manifest(format="another"), f"{MANIFEST}: found format 'another'.*expected 'course-faiss-store'"),
    (in_manifest(version=2), f"{MANIFEST}: found .*version 2; expected .*version 1"),
    *[(in_manifest(**{key: value}), None)
      for key in ("dimension", "count", "next_number", "sha256", "version", "format")
      for value in (None, -1, 4, 10 ** 12, 10 ** 30, 1e300, "5", [], {})],
    *[(in_manifest(dimension=d, count=c), None) for d, c in ((8, 5), (4, 6), (10 ** 6, 5), (5, 4), (4, 0))],
    (lambda p: rewrite(p, INDEX, lambda b: b[:-8]), "makes no store"),
    (lambda p: rewrite(p, INDEX, lambda b: b[:-8] + b[-16:-8]), "makes no store"),
    (lambda p: rewrite(p, INDEX, lambda b: b[:-8] + b"\xff" * 8), "makes no store"),
    (lambda p: rewrite(p, INDEX, lambda b: b"\xff" * len(b)), "makes no store"),
    (lambda p: rewrite(p, INDEX, lambda b: bytes(len(b))), "makes no store"),
    (lambda p: rewrite(p, NODES, lambda b: b.split(b"\n", 1)[1]), "makes no store"),
    (lambda p: rewrite(p, NODES, lambda b: (b.split(b"\n")[0] + b"\n") * 5), "a node id comes twice"),
    (lambda p: rewrite(p, NODES, lambda b: b"[]\n" * 5), "makes no store"),
    (lambda p: rewrite(p, NODES, lambda b: b"{}\n" * 5), "makes no store"),
    (lambda p: rewrite(p, NODES, lambda b: b"{\n" * 5), "makes no store"),
    (lambda p: rewrite(p, NODES, lambda b: b"[" * 100_000 + b"\n" * 5), "makes no store"),
])
def test_a_damaged_store_is_refused(store, tmp_path, damage, says):
    path = tmp_path / "s"
    store.persist(path)
    damage(path)
    if says is None and not _really_damaged(path, store):
        return
    with pytest.raises(StoreError, match=says) as error:
        FaissStore.load(path)
    assert str(path) in str(error.value)
    for part in ("found", "expected", "build_index"):
        assert part in str(error.value)


def _really_damaged(path: Path, store: FaissStore) -> bool:
    """Whether the manifest differs in what matters from the one that the store would write."""
    manifest = json.loads((path / MANIFEST).read_text())
    return not (manifest["dimension"] == DIMENSION and manifest["count"] == 5 and manifest["version"] == 1
                and manifest["format"] == "course-faiss-store" and manifest["next_number"] in (5, 10 ** 12)
                and isinstance(manifest["sha256"], dict) and manifest["sha256"])


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_refused_or_harmless(store, tmp_path, name):
    path = tmp_path / "s"
    store.persist(path)
    whole, before = (path / name).read_bytes(), contents(store)
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1:])
        try:
            after = contents(FaissStore.load(path))
        except StoreError:
            continue
        assert name == MANIFEST and {**after, "next": 5} == before and after["next"] >= 5


def test_only_a_store_is_overwritten(store, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    file = tmp_path / "thesis.txt"
    for path in (tmp_path, file):
        with pytest.raises(StoreError, match="not a store"):
            store.persist(path)
    store.persist(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="not a store"):
        store.persist(tmp_path / "s")
    assert file.read_text() == "mine" and (tmp_path / "s" / "notes.txt").read_text() == "mine"


def test_only_the_local_disk(store, tmp_path):
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.implementations.memory import MemoryFileSystem

    store.persist(tmp_path / "s", fs=LocalFileSystem())
    for call in (store.persist, FaissStore.from_persist_path):
        with pytest.raises(StoreError, match="MemoryFileSystem"):
            call(tmp_path / "s", fs=MemoryFileSystem())


class Killed(BaseException):
    """The process is gone: from now on no call reaches the disk, whatever handlers do."""


STEPS = ("mkdir", "fsync", "replace", "unlink", "rmdir")


def persist_until(store: FaissStore, path: Path, steps: int, after: bool = False) -> list[str]:
    """Persist, but die before (or right after) disk call number `steps`. Returns the names of the calls made."""
    made: list[str] = []

    def wrap(name, real):
        def call(*args, **kwargs):
            if len(made) > steps or len(made) == steps and not after:
                made.append("killed")
                raise Killed
            made.append(name)
            real(*args, **kwargs)
            if len(made) > steps:
                raise Killed
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        try:
            store.persist(path)
        except Killed:
            made.append("killed")
    return made


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_killed_at_any_step_leaves_the_old_or_the_new_store(store, tmp_path, first, after):
    """Twice in a row: the second attempt starts from what the first one left, and dies as well."""
    new = FaissStore(DIMENSION)
    new.add([chunk("new", (0, 0, 0, 1))])
    calls = persist_until(store, tmp_path / "plain", 99)
    total = len(persist_until(new, tmp_path / "plain", 99))
    assert calls[:calls.index("replace")].count("fsync") == 4, "all on disk before the swap"
    assert 8 < total < 30
    seen = Counter()
    for one in range(total + 1):
        for two in range(total + 1) if one % 3 == 0 else (one,):
            path = tmp_path / f"{one}-{two}"
            if not first:
                store.persist(path)
            persist_until(new, path, one, after)
            for attempt in range(2):
                if attempt == 0 and two % 2:  # load() repairs: now and then the second attempt comes without it
                    persist_until(new, path, two, after)
                    continue
                try:
                    left = {node.node_id for node in FaissStore.load(path).get_nodes()}
                except StoreError as error:
                    assert first and "no readable file" in str(error)
                    left = set()
                assert left in ({"new"}, set() if first else {"a1", "a2", "b1", "b2", "c"})
                seen["new" in left] += 1
                if attempt == 0:
                    persist_until(new, path, two, after)
            new.persist(path)
            assert len(FaissStore.load(path)) == 1
            assert not list(tmp_path.glob(f"{one}-{two}.*")), "no leftovers once a run succeeds"
            shutil.rmtree(path)
    assert seen[True] > 10 and seen[False] > 10


# ---- a long random comparison with a brute-force model

NAMES = [f"n{i}" for i in range(80)] + ["d0", "d1"]  # two nodes are called as documents are
DOCUMENTS = [f"d{i}" for i in range(9)]
COLOURS = ["red", "Red", "dark red", "blue", ""]

vectors = st.lists(st.integers(-2, 2), min_size=DIMENSION, max_size=DIMENSION).filter(any)
metadata = st.fixed_dictionaries({}, optional={"colour": st.sampled_from([*COLOURS, None]), "size": st.integers(0, 4)})
chunks = st.builds(lambda name, vector, document, values: chunk(name, vector, document, **values),
                   st.sampled_from(NAMES), vectors, st.sampled_from([*DOCUMENTS, None]), metadata)
batches = st.lists(chunks, max_size=6, unique_by=lambda node: node.node_id)
leaves = st.one_of(
    st.builds(where, st.just("colour"), st.sampled_from(COLOURS),
              st.sampled_from(["==", "!=", "text_match", "text_match_insensitive", "contains"])),
    st.builds(where, st.just("colour"), st.lists(st.sampled_from(COLOURS), max_size=3),
              st.sampled_from(["in", "nin", "any", "all"])),
    st.builds(where, st.just("size"), st.integers(0, 4), st.sampled_from(["==", "!=", ">", ">=", "<", "<="])),
    st.builds(where, st.sampled_from(["colour", "size", "absent"]), st.none(), st.just("is_empty")),
    st.builds(where, st.just("ref_doc_id"), st.sampled_from(DOCUMENTS)))
trees = st.recursive(
    st.builds(lambda parts, condition: filters(*parts, condition=condition), st.lists(leaves, min_size=1, max_size=3),
              st.sampled_from(["and", "or", "not"])),
    lambda inner: st.builds(lambda parts, condition: filters(*parts, condition=condition),
                            st.lists(st.one_of(leaves, inner), min_size=1, max_size=3),
                            st.sampled_from(["and", "or", "not"])), max_leaves=6)
some_names = st.lists(st.sampled_from([*NAMES, "unknown"]), max_size=20)
some_documents = st.lists(st.sampled_from([*DOCUMENTS, *NAMES[:3], "unknown"]), max_size=4)


def fits(part, values: dict) -> bool:
    """What a filter means, written again without LlamaIndex's help."""
    if isinstance(part, MetadataFilters):
        results = [fits(inner, values) for inner in part.filters]
        return {"and": all(results), "or": any(results), "not": not any(results)}[part.condition.value]
    value, wanted, operator = values.get(part.key), part.value, part.operator.value
    if operator == "is_empty":
        return value in (None, "")
    if value is None:
        return operator in ("!=", "nin")
    return {"==": lambda: value == wanted, "!=": lambda: value != wanted, ">": lambda: value > wanted,
            ">=": lambda: value >= wanted, "<": lambda: value < wanted, "<=": lambda: value <= wanted,
            "in": lambda: value in wanted, "nin": lambda: value not in wanted, "contains": lambda: wanted in value,
            "text_match": lambda: wanted in value, "text_match_insensitive": lambda: wanted.lower() in value.lower(),
            "any": lambda: any(w in value for w in wanted), "all": lambda: all(w in value for w in wanted)}[operator]()


counted: Counter[str] = Counter()


class Comparison(RuleBasedStateMachine):
    """The store beside a dict: node id → (vector, metadata, document), in order of insertion."""

    folder: Path  # set by the test
    largest = 0

    def __init__(self):
        super().__init__()
        self.store, self.model, self.used, self.steps = FaissStore(DIMENSION), {}, set(), 0

    def put(self, nodes):
        for node in nodes:
            vector = np.array(node.embedding, float)
            self.model[node.node_id] = (vector / np.linalg.norm(vector), node.metadata, node.ref_doc_id)

    def remove(self, condition):
        self.model = {name: row for name, row in self.model.items() if not condition(name, row)}

    def matching(self, node_ids=None, tree=None, documents=None):
        return [name for name, (_, values, document) in self.model.items()
                if (node_ids is None or name in node_ids) and (documents is None or (document or name) in documents)
                and (tree is None or fits(tree, {**values, "ref_doc_id": document or "None"}))]

    @initialize(number=st.integers(0, 10 ** 6), size=st.integers(0, 50))
    def start(self, number, size):
        """Many chunks at once, from one random number, so that most runs have a store worth searching."""
        random = np.random.default_rng(number)
        nodes = [chunk(name, random.integers(-2, 3, DIMENSION) + [5, 0, 0, 0], [*DOCUMENTS, None][random.integers(10)],
                       size=int(random.integers(5)), colour=COLOURS[random.integers(5)])
                 for name in random.permutation(NAMES[:80])[:size].tolist()]
        assert self.store.add(nodes) == [node.node_id for node in nodes]
        self.put(nodes)

    @rule(nodes=batches)
    def add(self, nodes):
        counted["add"] += 1
        if any(node.node_id in self.model for node in nodes):
            counted["add refused"] += 1
            with pytest.raises(ValueError, match="use upsert"):
                self.store.add(nodes)
        else:
            assert self.store.add(nodes) == [node.node_id for node in nodes]
            self.put(nodes)

    @rule(nodes=batches, bad=st.sampled_from([(0, 0, 0, 0), (1, 0, 0), (math.nan, 0, 0, 0), (0, math.inf, 0, 0)]),
          upsert=st.booleans(), place=st.integers(0, 6))
    def refused(self, nodes, bad, upsert, place):
        counted["bad vector"] += 1
        nodes.insert(place, chunk("bad", bad, "d1"))
        with pytest.raises(ValueError):
            (self.store.upsert if upsert else self.store.add)(nodes)

    @rule(nodes=batches)
    def upsert(self, nodes):
        counted["upsert"] += 1
        names = {node.node_id for node in nodes}
        documents = {node.ref_doc_id or node.node_id for node in nodes}
        assert self.store.upsert(nodes) == [node.node_id for node in nodes]
        self.remove(lambda name, row: name in names or (row[2] or name) in documents)
        self.put(nodes)

    @rule(document=st.sampled_from([*DOCUMENTS, *NAMES, "unknown"]))
    def delete(self, document):
        counted["delete"] += 1
        self.store.delete(document)
        self.remove(lambda name, row: (row[2] or name) == document)

    @rule(node_ids=st.none() | st.lists(st.sampled_from(NAMES), max_size=3), tree=st.none() | trees)
    def delete_nodes(self, node_ids, tree):
        counted["delete_nodes"] += 1
        if node_ids is None and tree is None:
            with pytest.raises(ValueError):
                self.store.delete_nodes()
            return
        gone = set(self.matching(node_ids, tree))
        self.store.delete_nodes(node_ids, tree)
        self.remove(lambda name, row: name in gone)

    @rule(node_ids=st.none() | some_names, tree=st.none() | trees)
    def get_nodes(self, node_ids, tree):
        counted["get_nodes"] += 1
        found = self.store.get_nodes(node_ids, tree)
        assert [node.node_id for node in found] == self.matching(node_ids, tree)
        for node in found:
            _, values, document = self.model[node.node_id]
            assert (node.metadata, node.ref_doc_id, node.text) == (values, document, f"text of {node.node_id}")

    @rule(vector=vectors, top_k=st.integers(1, 60))
    def query(self, vector, top_k):
        counted["query"] += 1
        self.check_query(vector, top_k)

    @rule(vector=vectors, top_k=st.integers(1, 8), tree=trees, node_ids=st.none() | some_names,
          documents=st.none() | some_documents)
    def query_with_conditions(self, vector, top_k, tree, node_ids, documents):
        counted["query with filters"] += 1
        self.check_query(vector, top_k, tree, node_ids, documents)

    def check_query(self, vector, top_k, tree=None, node_ids=None, documents=None):
        query = VectorStoreQuery(query_embedding=vector, similarity_top_k=top_k, filters=tree, node_ids=node_ids,
                                 doc_ids=documents)
        result = self.store.query(query)
        unit = np.array(vector) / np.linalg.norm(vector)
        scores = {name: float(self.model[name][0] @ unit) for name in self.matching(node_ids or None, tree, documents)}
        best = sorted(scores.values(), reverse=True)[:top_k]
        assert result.similarities == pytest.approx(best, abs=1e-6)
        assert len(set(result.ids)) == len(result.ids) == len(best)
        assert [scores[name] for name in result.ids] == pytest.approx(best, abs=1e-6)  # aside of ties, the same ids
        assert [node.node_id for node in result.nodes] == result.ids
        assert {name for name in scores if best and scores[name] > best[-1] + 1e-6} <= set(result.ids)
        order = {name: place for place, name in enumerate(self.model)}
        ranked = [(-score, order[name]) for name, score in zip(result.ids, result.similarities)]
        assert ranked == sorted(ranked), "ties by insertion"

    @rule(again=st.booleans())
    def persist_and_load(self, again):
        counted["persist and load"] += 1
        before = contents(self.store)
        self.store.persist(self.folder / "store")
        loaded = FaissStore.load(self.folder / "store")
        assert contents(loaded) == before == contents(self.store)
        if again:
            self.store = loaded

    @precondition(lambda self: self.steps > 40)
    @rule()
    def clear(self):
        counted["clear"] += 1
        self.steps = 0
        self.store.clear()
        self.model = {}

    @invariant()
    def same_contents(self):
        self.steps += 1
        now = contents(self.store)
        Comparison.largest = max(Comparison.largest, len(self.model))
        assert [row.node_id for row in now["chunks"].values()] == list(self.model)
        assert len(self.store) == self.store.client.ntotal == len(self.model)
        rows = zip(self.model.values(), now["chunks"].values(), now["vectors"].values())
        for (vector, _, document), row, stored in rows:
            assert row.document == (document or row.node_id) and np.abs(stored - vector).max() < 1e-6
        fresh = {(number, row.node_id) for number, row in now["chunks"].items()} - self.used
        assert not {number for number, _ in fresh} & {number for number, _ in self.used}, "a number was used twice"
        self.used |= fresh


def test_random_operations_against_brute_force(tmp_path, capsys, monkeypatch):
    """Rounds of five runs of up to fifty operations, each round with its own seed, until there are enough."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and tested above
    Comparison.folder = tmp_path
    counted.clear()
    for number in itertools.count():
        seed(number)(Comparison)
        run_state_machine_as_test(Comparison, settings=settings(
            max_examples=5, stateful_step_count=50, deadline=None, database=None,
            suppress_health_check=list(HealthCheck)))
        counts = {name: count for name, count in counted.items() if name != "add refused"}
        if sum(counts.values()) >= OPERATIONS:
            break
    with capsys.disabled():
        print(f"\n{sum(counts.values())} operations compared, sizes up to {Comparison.largest}: {dict(counted)}")
    assert len(counts) == 10 or OPERATIONS < 2000, "a rule that never ran"
