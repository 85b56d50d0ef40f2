"""What this machine has, what is wrong with it and how to mend it, and how long each notebook will take here.

    python -m utils.doctor                     # exit code 1 when something must be mended

    from utils.doctor import check
    checkup = check()
    checkup.table()

It imports torch and the other packages only once it knows that they are there and get along with each other.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Checkup", "Finding", "check", "speed_probe"]

ROOT = Path(__file__).resolve().parent.parent
SETUP = "python course.py setup"
PYTHONS = ((3, 11), (3, 13))
#: below the first number a notebook fails, below the second it is slow or a larger model will not fit
MEMORY_GB, DISK_GB = (1.5, 4), (1, 4)
FINE, NOTE, MEND = "fine", "note", "mend"
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, what was found, whether it is fine, and else what to do."""

    name: str
    found: str
    verdict: str = FINE
    remedy: str = ""

    def __str__(self) -> str:
        return f"[{self.verdict}] {self.name}: {self.found}" + (f"\n       Do: {self.remedy}" if self.remedy else "")


@dataclass
class Checkup:
    """What `check` found. `ok` is False when something must be mended."""

    findings: list[Finding] = field(default_factory=list)
    gflops: float | None = None
    expected_minutes: dict[str, float] = field(default_factory=dict)
    measured_minutes: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(finding.verdict != MEND for finding in self.findings)

    def table(self) -> pd.DataFrame:
        """The findings, one a row."""
        import pandas as pd

        return pd.DataFrame([{"what": f.name, "found": f.found, "verdict": f.verdict, "what to do": f.remedy}
                             for f in self.findings])

    def minutes(self) -> pd.DataFrame:
        """Minutes per notebook: measured (on the machine of the results file) and predicted here."""
        import pandas as pd

        return pd.DataFrame({"measured [min]": self.measured_minutes, "predicted here [min]": self.expected_minutes},
                            dtype=float).rename_axis("notebook").round(1)

    def brief(self) -> str:
        """Only what is not fine, and one closing line."""
        return "\n".join([str(f) for f in self.findings if f.verdict != FINE] + [self._closing()])

    def _closing(self) -> str:
        count = sum(f.verdict == MEND for f in self.findings)
        return (f"{count} thing{'s' * (count != 1)} must be mended before the course runs." if count else
                "This machine can run the course.")

    def __str__(self) -> str:
        lines = [str(f) for f in self.findings]
        if self.expected_minutes:
            lines += ["", "Minutes per notebook, measured and scaled to this machine's speed:", str(self.minutes())]
        elif self.gflops:
            lines += ["", "Minutes per notebook are unknown until someone has run: python course.py results"]
        return "\n".join(lines + ["", self._closing()])


def check(probe: bool = True) -> Checkup:
    """Look at everything; takes some seconds.

    Parameters
    ----------
    probe : measure the speed of this machine for two seconds and predict the minutes per notebook.
    """
    checkup = Checkup([python_finding(sys.version_info[:2]), packages_finding(ROOT / "requirements.txt"),
                       memory_finding(), disk_finding()])
    if not checkup.ok:
        return checkup
    loading = loading_finding()
    checkup.findings.append(loading)
    if loading.verdict == MEND:
        return checkup
    checkup.findings += [cores_finding(), gpu_finding(), openmp_finding(_openmp_libraries(), sys.platform),
                         offline_finding(os.environ), embedder_finding(),
                         course_lm_finding(ROOT / "data" / "course_lm")]
    if probe:
        checkup.gflops = speed_probe()
        checkup.findings.append(Finding("speed", f"{checkup.gflops:.0f} GFLOP/s (float32 matrix products)"))
        results = ROOT / "data" / "results" / "results.json"
        lessons = json.loads(results.read_text(encoding="utf-8"))["lessons"] if results.exists() else {}
        checkup.measured_minutes, checkup.expected_minutes = predicted_minutes(lessons, checkup.gflops)
    return checkup


# -- the machine -------------------------------------------------------------------------------------------------------
def python_finding(version: Sequence[int]) -> Finding:
    """Whether this Python is one that the course is tested with."""
    low, high = (".".join(map(str, v)) for v in PYTHONS)
    found = f"{'.'.join(map(str, version))} at {sys.executable}"
    if PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[1]:
        inside = Path(sys.executable).is_relative_to(ROOT)  # a table in a committed notebook names no folder of a machine
        place = Path(sys.executable).relative_to(ROOT).as_posix() if inside else "not the course's own .venv"
        return Finding("Python", f"{'.'.join(map(str, version))} ({place})")
    return Finding("Python", found, MEND, f"Install a Python from {low} to {high}, then run {SETUP} with it.")


def packages_finding(requirements: Path) -> Finding:
    """Each pinned requirement against what is installed."""
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE))
    missing, different = [], []
    for name, version in pins.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed.split("+")[0] != version:  # torch 2.13.0+cpu is 2.13.0
            different.append(f"{name} {installed} (tested: {version})")
    if missing:
        return Finding("packages", f"missing: {', '.join(missing)}", MEND,
                       f"{SETUP} (or pip install -r requirements.txt)")
    if different:
        return Finding("packages", f"other versions than tested: {', '.join(different)}", NOTE,
                       f"Results may differ a little, as in Colab. For the tested versions: {SETUP}")
    return Finding("packages", f"all {len(pins)} as pinned")


def _limits(name: str, found: str, size: float, limits: tuple[float, float], remedy: str) -> Finding:
    verdict = MEND if size < limits[0] else NOTE if size < limits[1] else FINE
    return Finding(name, found, verdict, "" if verdict == FINE else remedy)


def memory_finding() -> Finding:
    """Memory of the machine, or of the container where that is less."""
    import psutil

    memory = psutil.virtual_memory()
    total = memory.total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    available = min(memory.available, total)
    return _limits("memory", f"{available / _GB:.1f} GB free of {total / _GB:.1f} GB", available / _GB, MEMORY_GB,
                   f"Close other programs and other notebooks' kernels: {MEMORY_GB[0]} GB must be free, "
                   f"{MEMORY_GB[1]} GB are comfortable.")


def disk_finding(folder: Path = ROOT) -> Finding:
    """Free disk where the course writes its caches."""
    free = shutil.disk_usage(folder).free / _GB
    return _limits("disk", f"{free:.1f} GB free", free, DISK_GB, f"Make room: {DISK_GB[0]} GB must be free, "
                   f"{DISK_GB[1]} GB are comfortable. Or set COURSE_WORK to a folder on another disk.")


def cores_finding() -> Finding:
    """Cores, and how many of them the course uses."""
    from .settings import settings

    cores = os.cpu_count() or 1
    if settings.threads > cores:
        return Finding("cores", f"{cores}, but COURSE_THREADS is {settings.threads}", NOTE,
                       f"More threads than cores are slower: unset COURSE_THREADS or set it to {cores}.")
    return Finding("cores", f"{cores}, of which the course uses {settings.threads} ({platform.machine()})")


def gpu_finding() -> Finding:
    """A GPU is needed in the mode `full` only."""
    import torch

    from .settings import settings

    if torch.cuda.is_available():
        return Finding("GPU", torch.cuda.get_device_name(0))
    found = "Apple GPU, not used" if torch.backends.mps.is_available() else "none; the default mode needs none"
    if settings.mode == "full":
        return Finding("GPU", found, NOTE, "Unset COURSE_MODE for the mode tiny: full takes hours without a CUDA GPU.")
    return Finding("GPU", found)


# -- do the packages get along? ----------------------------------------------------------------------------------------
_TRIAL = """import utils.settings, torch, faiss, numpy, sklearn.cluster
index = faiss.IndexFlatIP(8)
index.add(numpy.ones((64, 8), "float32"))
index.search((torch.ones(64, 64) @ torch.ones(64, 8)).numpy(), 3)"""


def loading_finding() -> Finding:
    """Whether torch, faiss and scikit-learn work in one process: tried in another one, so that a crash harms nobody."""
    if {"torch", "faiss"} <= set(sys.modules):
        return Finding("torch and faiss", "loaded together")
    done = subprocess.run([sys.executable, "-c", _TRIAL], cwd=ROOT, capture_output=True, text=True, errors="replace")
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode == 0:
        return Finding("torch and faiss", "work together")
    if "Error" in lines[-1] and "OMP" not in lines[-1]:
        return Finding("torch and faiss", lines[-1], MEND, f"Follow the message; if it names a package: {SETUP}")
    return Finding("torch and faiss", f"crash together: {lines[-1]}", MEND,
                   f"Two OpenMP runtimes clash. Set COURSE_THREADS=1 and try again; if they still crash, make a new "
                   f"environment: delete .venv, then {SETUP}")


def _openmp_libraries() -> list[tuple[str, str]]:
    """(kind, file) of each OpenMP runtime that torch and faiss loaded into this process."""
    from threadpoolctl import threadpool_info

    from . import settings as _settings  # noqa: F401  (loads torch and faiss)

    return [(found["prefix"], found["filepath"]) for found in threadpool_info() if found["user_api"] == "openmp"]


def openmp_finding(libraries: Iterable[tuple[str, str]], system: str) -> Finding:
    """Judge the loaded OpenMP runtimes: copies of GNU's on Linux are harmless, other mixtures may crash or hang."""
    libraries = sorted(set(libraries))
    kinds = sorted({kind for kind, _ in libraries})
    found = f"{len(libraries)} loaded ({', '.join(kinds) or 'none'})"
    if len(libraries) < 2 or kinds == ["libgomp"] and system == "linux":
        return Finding("OpenMP runtimes", found)
    if len(kinds) > 1:
        files = "; ".join(file for _, file in libraries)
        return Finding("OpenMP runtimes", f"{found}: {files}", NOTE if "libiomp" not in kinds else MEND,
                       f"Packages of two sources (such as conda and pip) are mixed, which may hang or crash. Make an "
                       f"environment of its own: delete .venv, then {SETUP}")
    return Finding("OpenMP runtimes", found, NOTE, "Nothing yet: the course loads them in a safe order. Should a "
                   "notebook die without a message, set COURSE_THREADS=1 and restart it.")


# -- models and network ------------------------------------------------------------------------------------------------
def offline_finding(environment: Mapping[str, str]) -> Finding:
    """Whether the hub libraries are told to stay offline, as the default mode promises."""
    from .settings import settings

    chosen = f"mode {settings.mode}, LLM {settings.llm}, embedder {settings.embedder}"
    if not settings.offline:
        return Finding("network", f"allowed, as a hub model was asked for ({chosen})")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    online = [name for name in names if environment.get(name) not in ("1", "ON", "YES", "TRUE")]
    if online:
        return Finding("network", f"not switched off: {', '.join(online)} ({chosen})", NOTE,
                       f"Unset {', '.join(online)} before you start, and restart the kernel.")
    return Finding("network", f"switched off for the hub libraries ({chosen})")


def embedder_finding() -> Finding:
    """Whether the embedder's files are there and are the published ones."""
    from .embedding import EmbedderMissing, embedder_folder
    from .settings import settings

    try:
        embedder_folder()
    except EmbedderMissing as error:
        return Finding("embedder", str(error), MEND, "Do what the message says.")
    return Finding("embedder", settings.embedder + ", weights right (SHA-256)" * (settings.embedder == "minilm"))


def course_lm_finding(folder: Path) -> Finding:
    """Whether the files of CourseLM are those that SHA256SUMS beside them names (lines "digest  file")."""
    from .settings import settings

    sums, remedy = folder / "SHA256SUMS", "git checkout -- data/course_lm"
    if settings.llm != "course-lm":
        return Finding("CourseLM", f"not asked for (COURSE_LLM is {settings.llm})")
    if not sums.exists():
        return Finding("CourseLM", "data/course_lm/SHA256SUMS is missing", MEND, remedy)
    wrong = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, name = line.split(maxsplit=1)
        path = folder / name.lstrip("*")
        if not path.exists():
            wrong.append(f"{path.name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(f"{path.name} is damaged or another file")
    if wrong:
        return Finding("CourseLM", "; ".join(wrong), MEND, remedy)
    return Finding("CourseLM", "all files right (SHA-256)")


# -- speed -------------------------------------------------------------------------------------------------------------
def speed_probe(seconds: float = 2.0, size: int = 1024) -> float:
    """Speed of this machine in GFLOP/s: the median over float32 products of two (size, size) matrices."""
    import torch

    from . import settings as _settings  # noqa: F401  (sets the threads)

    first, second = torch.rand(size, size), torch.rand(size, size)
    first @ second
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        first @ second
        times.append(time.perf_counter() - begin)
    return 2 * size ** 3 / statistics.median(times) / 1e9


def predicted_minutes(lessons: Mapping[str, Mapping], gflops: float) -> tuple[dict[str, float], dict[str, float]]:
    """Measured minutes by lesson, and the same scaled by the speed of the measuring machine over `gflops`."""
    measured = {name: record["run"]["minutes"] for name, record in lessons.items()}
    return measured, {name: minutes * (lessons[name]["run"].get("gflops") or gflops) / gflops
                      for name, minutes in measured.items()}


if __name__ == "__main__":
    _checkup = check()
    print(_checkup)
    sys.exit(0 if _checkup.ok else 1)
