"""Vectors of chunks in FAISS, behind the interface that LlamaIndex expects of a vector store.

The official FAISS integration cannot filter by metadata, and cannot delete a document that was cut into chunks. This
one keeps a table from FAISS's numbers to the chunks beside the FAISS index, and changes both together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import settings as _settings  # noqa: F401  (imports torch before faiss and sets the threads)

import faiss
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore, FilterCondition, MetadataFilters, VectorStoreQuery, VectorStoreQueryResult)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn, metadata_dict_to_node, node_to_metadata_dict

__all__ = ["FaissStore", "StoreError"]

FORMAT, VERSION = "course-faiss-store", 1
INDEX, NODES, MANIFEST = "index.faiss", "nodes.jsonl", "manifest.json"


class StoreError(RuntimeError):
    """A store on disk cannot be read or written; the message names the file and says what to do."""


@dataclass(frozen=True)
class _Chunk:
    """One row of the table. `record` is LlamaIndex's form of the node: metadata by name, "_node_content" as JSON."""

    node_id: str
    document: str
    record: dict[str, Any]

    @classmethod
    def of(cls, node: BaseNode, record: dict[str, Any]) -> "_Chunk":
        return cls(node.node_id, node.ref_doc_id or node.node_id, record)  # without ref_doc_id it is its own document


class FaissStore(BasePydanticVectorStore):
    """Exact search by cosine over chunks, with metadata filters, upserts, deletion and a safe way to disk.

    Vectors are scaled to unit length, so that FAISS's inner product is the cosine. Every vector has a number that grows
    and is never used twice. Nodes go in and come out as copies, without their embeddings. A filter sees a node's
    metadata and, as in LlamaIndex's own stores, its ref_doc_id under the names ref_doc_id, doc_id and document_id. Not
    made for several threads that write at once.

    Parameters
    ----------
    dimension : length of a vector.
    """

    stores_text: bool = True
    flat_metadata: bool = True
    dimension: int
    _index: Any = PrivateAttr()
    _chunks: dict[int, _Chunk] = PrivateAttr(default_factory=dict)  # number → chunk, in order of insertion
    _numbers: dict[str, int] = PrivateAttr(default_factory=dict)    # node id → number
    _next: int = PrivateAttr(default=0)

    def __init__(self, dimension: int):
        if type(dimension) is not int or not 1 <= dimension <= 1_000_000:
            raise ValueError(f"dimension is {dimension!r}; expected a whole number from 1 to 1,000,000. "
                             "Take the length of the embedder's vectors, e.g. CourseEmbedding().dimension.")
        super().__init__(dimension=dimension)
        self._index = _empty_index(dimension)

    @classmethod
    def class_name(cls) -> str:
        return "FaissStore"

    @property
    def client(self) -> Any:
        """The FAISS index. Look at it, but change it only through the store."""
        return self._index

    def __len__(self) -> int:
        return len(self._chunks)

    def __bool__(self) -> bool:
        """Always true: LlamaIndex asks `if vector_store:` and would put a store of its own in place of an empty one."""
        return True

    # ---- changing

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Add chunks with embeddings: all of them, or none when one is refused. Returns their node ids.

        Raises
        ------
        ValueError : a node id is there already or comes twice; an embedding is missing, of the wrong length, not finite
            or zero; metadata is not flat.
        """
        chunks, vectors = self._prepare(nodes)
        known = [chunk.node_id for chunk in chunks if chunk.node_id in self._numbers]
        if known:
            raise ValueError(f"{len(known)} of {len(chunks)} node ids are in the store already, e.g. '{known[0]}'; "
                             "nothing was added. To replace chunks, use upsert().")
        return self._exchange([], chunks, vectors)

    def upsert(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Put chunks in place of all chunks of the same documents, and of any chunk with the same node id.

        Give all chunks of a document at once: old ones that are not among them vanish. Raises as `add` does, and then
        leaves the store as it was.
        """
        chunks, vectors = self._prepare(nodes)
        old = {*self._select(doc_ids=[chunk.document for chunk in chunks]),
               *self._select(node_ids=[chunk.node_id for chunk in chunks])}
        return self._exchange(sorted(old), chunks, vectors)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove every chunk of a document; an unknown document is no error."""
        self._exchange(self._select(doc_ids=[ref_doc_id]))

    def delete_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None,
                     **delete_kwargs: Any) -> None:
        """Remove the chunks that have one of the node ids and match the filters (whichever is given)."""
        if node_ids is None and not (filters and filters.filters):
            raise ValueError("delete_nodes() got neither node ids nor a filter; expected at least one. "
                             "To remove everything, use clear().")
        self._exchange(self._select(node_ids, filters))

    def clear(self) -> None:
        """Remove everything. Numbers go on from where they were."""
        self._index, self._chunks, self._numbers = _empty_index(self.dimension), {}, {}

    def _prepare(self, nodes: Iterable[BaseNode]) -> tuple[list[_Chunk], np.ndarray]:
        """Check everything before anything changes: the chunks and their unit vectors, shape (nodes, dimension)."""
        chunks, vectors = {}, []
        for node in nodes:
            if node.node_id in chunks:
                raise ValueError(f"Node id '{node.node_id}' comes more than once in the same call; nothing was "
                                 "changed. Give every chunk an id of its own.")
            vectors.append(self._unit(node.embedding, f"Chunk '{node.node_id}'"))
            try:
                chunks[node.node_id] = _Chunk.of(node, node_to_metadata_dict(node, flat_metadata=True))
            except ValueError as error:
                raise ValueError(f"Chunk '{node.node_id}' has metadata that cannot be filtered: {error}; nothing was "
                                 "changed. Join a list into one string, or drop the key.") from error
        return list(chunks.values()), np.array(vectors, np.float32).reshape(-1, self.dimension)

    def _unit(self, values: Sequence[float] | None, who: str) -> np.ndarray:
        """`values` scaled to unit length: float32, shape (dimension,)."""
        if values is None:
            raise ValueError(f"{who} has no embedding; expected {self.dimension} numbers. Embed it first.")
        vector = np.asarray(values, np.float64)
        if vector.shape != (self.dimension,):
            raise ValueError(f"{who} has an embedding of shape {vector.shape}; expected ({self.dimension},). "
                             "Use the embedder that the store was made for, or make a new store.")
        if not np.isfinite(vector).all() or not vector.any():
            raise ValueError(f"{who} has an embedding that is zero or not finite, so it has no direction; expected "
                             f"{self.dimension} finite numbers, not all zero. Check the text and the embedder.")
        vector = vector / np.abs(vector).max()  # so that the norm cannot overflow
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def _exchange(self, old: list[int], chunks: Sequence[_Chunk] = (), vectors: np.ndarray | None = None) -> list[str]:
        """The one place where index and table change: new chunks in, old numbers out. Returns the new node ids."""
        numbers = range(self._next, self._next + len(chunks))
        if chunks:
            self._index.add_with_ids(vectors, np.array(numbers, np.int64))
        if old:
            self._index.remove_ids(np.array(old, np.int64))
        for number in old:
            del self._numbers[self._chunks.pop(number).node_id]
        for number, chunk in zip(numbers, chunks):
            self._chunks[number], self._numbers[chunk.node_id] = chunk, number
        self._next += len(chunks)
        return [chunk.node_id for chunk in chunks]

    # ---- finding

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes that have one of the ids and match the filters (whichever is given), in order of insertion."""
        return [metadata_dict_to_node(self._chunks[number].record) for number in self._select(node_ids, filters)]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The `similarity_top_k` most similar chunks among those that node_ids, doc_ids and filters allow.

        Exact: FAISS proposes every chunk within rounding of the k-th best, and these are ordered by their inner product
        in float64, equal ones by insertion. Returns nodes, ids and similarities (cosines, float), best first. An empty
        list of node_ids allows every chunk, because `index.as_retriever()` always passes one; an empty list of doc_ids
        allows none.

        Raises
        ------
        ValueError : a mode other than DEFAULT, no or a bad query embedding, similarity_top_k below 1.
        """
        if query.mode != "default":
            raise ValueError(f"The query mode is {query.mode!r}; FaissStore knows only VectorStoreQueryMode.DEFAULT. "
                             "For keywords or a hybrid, see utils.retrieval.")
        if query.similarity_top_k < 1:
            raise ValueError(f"similarity_top_k is {query.similarity_top_k}; expected at least 1.")
        vector = self._unit(query.query_embedding, "The query")
        allowed = self._select(query.node_ids or None, query.filters, query.doc_ids)
        if not allowed:
            return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])
        numbers, scores = self._search(vector, allowed, min(query.similarity_top_k, len(allowed)))
        chunks = [self._chunks[number] for number in numbers]
        return VectorStoreQueryResult(nodes=[metadata_dict_to_node(chunk.record) for chunk in chunks],
                                      similarities=scores, ids=[chunk.node_id for chunk in chunks])

    def _search(self, vector: np.ndarray, allowed: list[int], top_k: int) -> tuple[list[int], list[float]]:
        """Numbers and cosines of the `top_k` nearest among the numbers `allowed`."""
        only = None
        if len(allowed) < len(self):
            only = faiss.SearchParameters(sel=faiss.IDSelectorBatch(np.array(allowed, np.int64)))
        rough, _ = self._index.search(vector[None], top_k, params=only)
        rounding = self.dimension * 2.0 ** -23  # twice the largest error of a float32 inner product of unit vectors
        near = np.sort(self._index.range_search(vector[None], float(rough[0, -1]) - rounding, params=only)[2])
        scores = (self._index.reconstruct_batch(near).astype(np.float64) * vector).sum(axis=1)
        best = np.argsort(-scores, kind="stable")[:top_k]
        return near[best].tolist(), scores[best].tolist()

    def _select(self, node_ids: Iterable[str] | None = None, filters: MetadataFilters | None = None,
                doc_ids: Iterable[str] | None = None) -> list[int]:
        """Numbers of the chunks that meet every condition given, in order of insertion."""
        for ids in (node_ids, doc_ids):
            if isinstance(ids, str):
                raise TypeError(f"Got the text '{ids}' as ids; expected a list of ids. Write ['{ids}'].")
        nodes, documents = (None if ids is None else set(ids) for ids in (node_ids, doc_ids))
        matches = _matcher(filters, lambda number: self._chunks[number].record)
        try:
            return [number for number, chunk in self._chunks.items()
                    if (nodes is None or chunk.node_id in nodes) and (documents is None or chunk.document in documents)
                    and matches(number)]
        except TypeError as error:
            raise TypeError(f"The filter ({filters}) does not fit the metadata of a chunk: {error}. Compare text with "
                            "text and numbers with numbers.") from error

    # ---- to disk and back

    def persist(self, persist_path: str | Path, fs: Any = None) -> None:
        """Write the store into the folder `persist_path`; a crash at any moment leaves the old store or the new one.

        Raises
        ------
        StoreError : `fs` is not the local disk, or the folder holds something else than a store.
        """
        files = {INDEX: faiss.serialize_index(self._index).tobytes(),
                 NODES: "".join(json.dumps(chunk.record) + "\n" for chunk in self._chunks.values()).encode()}
        manifest = {"format": FORMAT, "version": VERSION, "dimension": self.dimension, "count": len(self),
                    "next_number": self._next, "sha256": {name: _sha256(data) for name, data in files.items()}}
        _swap_in(_local(persist_path, fs), {**files, MANIFEST: json.dumps(manifest, indent=1).encode()})

    @classmethod
    def from_persist_path(cls, persist_path: str | Path, fs: Any = None) -> "FaissStore":
        """Read a store that `persist` wrote (also under the name `load`). No file is parsed before its hash is right.

        Raises
        ------
        StoreError : the folder or a file is missing, damaged, of another program or of another version.
        """
        path = _local(persist_path, fs)
        _recover(path)
        file, data = path / MANIFEST, {}
        try:
            manifest = json.loads(file.read_bytes())
            kind = manifest["format"], manifest["version"]
            if kind != (FORMAT, VERSION):
                raise _damaged(file, f"format {kind[0]!r}, version {kind[1]!r}", f"{FORMAT!r}, version {VERSION}")
            for name in (INDEX, NODES):
                file, expected = path / name, manifest["sha256"][name]
                data[name] = file.read_bytes()
                if _sha256(data[name]) != expected:
                    raise _damaged(file, f"{len(data[name])} bytes with SHA-256 {_sha256(data[name])}", expected)
            file, store = path, cls(manifest["dimension"])
            store._fill(data, manifest["count"], manifest["next_number"])
            return store
        except StoreError:
            raise
        except OSError as error:
            raise _damaged(file, f"no readable file ({error.strerror})", "a file of a store") from error
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(file, f"something that makes no store ({error!r})", "what persist() writes") from error

    load = from_persist_path

    def _fill(self, data: dict[str, bytes], count: int, next_number: int) -> None:
        """Fill an empty store. ValueError when the parts contradict one another.

        FAISS's own reader believes the sizes that a file claims, so it never sees this one: the file must be as long as
        `count` says, and the two arrays at its end, vectors and numbers, are read by NumPy.
        """
        records = [json.loads(line) for line in data[NODES].splitlines()]
        frame, size = len(faiss.serialize_index(_empty_index(1))), 4 * count * self.dimension  # bytes
        if len(records) != count or len(data[INDEX]) != frame + size + 8 * count:
            raise ValueError(f"{len(records)} nodes and {len(data[INDEX])} bytes of index for {count} chunks")
        vectors = np.frombuffer(data[INDEX][frame - 8: frame - 8 + size], "<f4").reshape(count, self.dimension)
        numbers = np.frombuffer(data[INDEX][frame + size:], "<i8").tolist()
        chunks = [_Chunk.of(metadata_dict_to_node(record), record) for record in records]
        self._chunks, self._next = dict(zip(numbers, chunks)), min(int(next_number), 2 ** 62)
        self._numbers = {chunk.node_id: number for number, chunk in self._chunks.items()}
        if len(self._numbers) != count or [-1, *numbers, next_number] != sorted({-1, *numbers, self._next}):
            raise ValueError("a node id comes twice or the numbers of the chunks do not grow")
        if not (np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1) < 1e-3).all():
            raise ValueError("a vector is not of unit length")
        if chunks:
            self._index.add_with_ids(vectors, np.array(numbers, np.int64))


def _empty_index(dimension: int) -> Any:
    return faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))


def _matcher(filters: MetadataFilters | None, lookup: Callable[[int], dict]) -> Callable[[int], bool]:
    """LlamaIndex's own function for each single filter, joined here because it refuses nested ones."""
    if filters is None or not filters.filters:
        return lambda number: True
    parts = [_matcher(part, lookup) if isinstance(part, MetadataFilters)
             else build_metadata_filter_fn(lookup, MetadataFilters(filters=[part])) for part in filters.filters]

    def matches(number: int) -> bool:
        results = [part(number) for part in parts]
        if filters.condition == FilterCondition.NOT:
            return not any(results)
        return any(results) if filters.condition == FilterCondition.OR else all(results)

    return matches


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(file: Path, found: str, expected: str) -> StoreError:
    return StoreError(f"{file}: found {found}; expected {expected}. Do: delete the folder of the store, build the "
                      "index again with utils.retrieval.build_index and persist its store.")


def _local(path: str | Path, fs: Any) -> Path:
    if fs is not None and not isinstance(fs, LocalFileSystem):
        raise StoreError(f"{path}: got the file system {type(fs).__name__}; expected the local disk, where folders can "
                         "be swapped safely. Do: leave fs out and copy the folder afterwards.")
    return Path(path).expanduser().resolve()


def _recover(path: Path) -> tuple[Path, Path]:
    """Undo half a swap: a crash between its two renames leaves the old store under its waiting name only.

    Returns the folder where a new store is prepared and the one where the old store waits.
    """
    new, old = path.with_name(path.name + ".new.part"), path.with_name(path.name + ".old.part")
    if old.exists() and not path.exists():
        os.replace(old, path)
    return new, old


def _swap_in(path: Path, files: dict[str, bytes]) -> None:
    """Write `files` into a folder beside `path`, wait until they are on the disk, then swap the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _recover(path)
    if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} in (set(), set(files))):
        raise StoreError(f"{path}: found something that is not a store; expected a new or empty folder, or one that "
                         "holds a store and nothing else. Do: choose another folder; nothing was written.")
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    new.mkdir()
    for name, data in files.items():
        with open(new / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(new)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
