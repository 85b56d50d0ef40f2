"""Where things lie and in which mode the course runs.

Everything can be set by an environment variable, so that the same notebook runs on a laptop, in Colab and in CI:

=================== ============== ==========================================================================
variable            default        meaning
=================== ============== ==========================================================================
COURSE_MODE         tiny           replay (committed results), tiny (everything live on the CPU), full (hub models)
COURSE_LLM          course-lm      course-lm, a local folder, a hub id, or an OpenAI-compatible address
COURSE_EMBEDDER     minilm         minilm, a sentence-transformers folder or a hub id
COURSE_WORK         .work          folder for caches and results; git ignores it
COURSE_SEED         0              seed of everything random
COURSE_THREADS      all cores      threads of torch and FAISS
=================== ============== ==========================================================================

This module is imported before torch and faiss, sets the threads of both, and keeps hub libraries offline unless a hub
model was asked for.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COLOURS", "DATA", "MODES", "ROOT", "Settings", "WORK", "banner", "seed_everything", "settings"]

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
MODES = ("replay", "tiny", "full")

#: one colour a system in all notebooks (Okabe & Ito's palette, readable for colour-blind people)
COLOURS = {
    "keyword": "#E69F00", "dense": "#0072B2", "hybrid": "#009E73",
    "base": "#999999", "RAG": "#0072B2", "fine-tuned": "#D55E00", "both": "#009E73",
    "RAFT": "#E69F00", "oracle": "#56B4E9", "shuffled": "#CC79A7",
}


@dataclass(frozen=True)
class Settings:
    """What the environment variables say, checked."""

    mode: str
    llm: str
    embedder: str
    work: Path
    seed: int
    threads: int

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the variables. Raises ValueError that names the variable, its value and what it may be."""
        mode = os.environ.get("COURSE_MODE", "tiny")
        if mode not in MODES:
            raise ValueError(f"COURSE_MODE is '{mode}'; it must be one of {', '.join(MODES)}. "
                             "Unset it for the default (tiny).")
        cores = os.cpu_count() or 1
        return cls(mode=mode, llm=os.environ.get("COURSE_LLM", "course-lm"),
                   embedder=os.environ.get("COURSE_EMBEDDER", "minilm"),
                   work=Path(os.environ.get("COURSE_WORK", ROOT / ".work")).expanduser().resolve(),
                   seed=_whole_number("COURSE_SEED", 0, 0), threads=_whole_number("COURSE_THREADS", cores, 1))

    @property
    def offline(self) -> bool:
        """True when no model of a hub was asked for: then nothing may touch the network."""
        return self.mode != "full" and all(
            name in ("course-lm", "minilm") or Path(name).expanduser().exists() for name in (self.llm, self.embedder))


def _whole_number(variable: str, default: int, low: int) -> int:
    text = os.environ.get(variable, str(default))
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise ValueError(f"{variable} is '{text}'; it must be a whole number of at least {low}. Unset it for {default}.")
    return value


settings = Settings.from_environment()
WORK = settings.work

if settings.offline:
    for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(_name, "1")
for _name, _value in {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
                      "OMP_NUM_THREADS": str(settings.threads),
                      # waiting threads sleep instead of spinning: beside another busy program spinning costs minutes
                      "OMP_WAIT_POLICY": "passive"}.items():
    os.environ.setdefault(_name, _value)

# torch and faiss each bring an OpenMP runtime: torch first, then faiss with the same number of threads
import torch  # noqa: E402
import faiss  # noqa: E402

torch.set_num_threads(settings.threads)
faiss.omp_set_num_threads(settings.threads)


def seed_everything(seed: int | None = None) -> int:
    """Seed Python, NumPy and torch; returns the seed used (`settings.seed` when none is given)."""
    import numpy as np

    seed = settings.seed if seed is None else seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def banner(seeds: tuple[int, ...] | None = None) -> str:
    """One line to stand on every table of results: mode, models, seeds, date, hardware."""
    import datetime
    import platform

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{settings.threads} CPU threads"
    return (f"mode {settings.mode} · LLM {settings.llm} · embedder {settings.embedder} · "
            f"seeds {', '.join(map(str, seeds or (settings.seed,)))} · {datetime.date.today():%Y-%m-%d} · "
            f"{platform.machine()}, {device}")
