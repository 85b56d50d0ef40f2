"""utils.doctor: every fault is found and comes with its remedy."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from utils import doctor, embedding
from utils.doctor import FINE, MEND, NOTE, Checkup, Finding, check


def test_a_sound_machine_has_nothing_to_mend():
    checkup = check(probe=False)
    assert checkup.ok, str(checkup)
    assert list(checkup.table()["what"]) == ["Python", "packages", "memory", "disk", "torch and faiss", "cores", "GPU",
                                             "OpenMP runtimes", "network", "embedder", "CourseLM"]
    assert checkup.gflops is None and checkup.minutes().empty
    assert "This machine can run the course." in str(checkup)


@pytest.mark.parametrize("version, verdict", [((2, 7), MEND), ((3, 10), MEND), ((3, 11), FINE), ((3, 13), FINE),
                                              ((3, 14), MEND)])
def test_the_python_versions(version, verdict):
    assert doctor.python_finding(version).verdict == verdict


def test_a_fitting_python_is_named_without_folders_of_this_machine_an_unfit_one_in_full(monkeypatch):
    monkeypatch.setattr(sys, "executable", str(doctor.ROOT / ".venv" / "bin" / "python"))
    assert doctor.python_finding((3, 12)).found == "3.12 (.venv/bin/python)"
    elsewhere = str(doctor.ROOT.parent / "elsewhere" / "python3")
    monkeypatch.setattr(sys, "executable", elsewhere)
    assert doctor.python_finding((3, 12)).found == "3.12 (not the course's own .venv)"
    assert elsewhere in doctor.python_finding((3, 10)).found


def test_packages_that_are_missing_or_other_than_tested_are_named(tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text(f"# a comment\npytest=={pytest.__version__}  # a licence\n")
    assert doctor.packages_finding(pins) == Finding("packages", "all 1 as pinned")
    pins.write_text("pytest==0.1\n")
    finding = doctor.packages_finding(pins)
    assert finding.verdict == NOTE and f"pytest {pytest.__version__} (tested: 0.1)" in finding.found
    pins.write_text("pytest==0.1\nno-such-package-of-this-course==1\n")
    finding = doctor.packages_finding(pins)
    assert finding.verdict == MEND and "no-such-package-of-this-course" in finding.found
    assert "python course.py setup" in finding.remedy


def test_the_torch_of_a_special_build_counts_as_its_version(tmp_path, monkeypatch):
    pins = tmp_path / "requirements.txt"
    pins.write_text("torch==2.13.0\n")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor.packages_finding(pins).verdict == FINE


@pytest.mark.parametrize("size, verdict", [(0.5, MEND), (2, NOTE), (50, FINE)])
def test_too_little_is_mended_and_scarce_is_noted(size, verdict):
    finding = doctor._limits("disk", "", size, (1, 4), "Make room.")
    assert finding.verdict == verdict and bool(finding.remedy) == (verdict != FINE)


@pytest.mark.parametrize("libraries, system, verdict", [
    ([], "linux", FINE),
    ([("libgomp", "a")], "linux", FINE),
    ([("libgomp", "torch/a"), ("libgomp", "faiss/b")], "linux", FINE),
    ([("libomp", "torch/a"), ("libomp", "faiss/b")], "darwin", NOTE),
    ([("libomp", "torch/a"), ("libgomp", "faiss/b")], "darwin", NOTE),
    ([("libiomp", "numpy/a"), ("libomp", "torch/b")], "linux", MEND)])
def test_openmp_runtimes_are_judged_by_kind_and_system(libraries, system, verdict):
    finding = doctor.openmp_finding(libraries, system)
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != FINE)


@pytest.mark.parametrize("stderr, returncode, words", [
    ("Traceback\nValueError: COURSE_MODE is 'x'; it must be one of replay, tiny, full", 1, "COURSE_MODE is 'x'"),
    ("", -11, "crash together: exit code -11"),
    ("OMP: Error #15: Initializing libomp.dylib, but found libomp.dylib already initialized.", -6, "OMP: Error #15")])
def test_packages_that_crash_when_loaded_together_are_found_in_another_process(monkeypatch, stderr, returncode, words):
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "faiss"})
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, returncode, "", stderr))
    finding = doctor.loading_finding()
    assert finding.verdict == MEND and words in finding.found
    assert ("COURSE_THREADS=1" in finding.remedy) == (returncode < 0)


def test_hub_libraries_that_are_online_are_named():
    finding = doctor.offline_finding({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "0"})
    assert finding.verdict == NOTE and "TRANSFORMERS_OFFLINE, HF_DATASETS_OFFLINE" in finding.found
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    assert doctor.offline_finding(offline).verdict == FINE


def test_a_foreign_embedder_is_found(monkeypatch):
    monkeypatch.setattr(embedding, "MINILM_SHA256", "0" * 64)
    finding = doctor.embedder_finding()
    assert finding.verdict == MEND and "expected 0000" in finding.found


def test_course_lm_files_are_checked_one_by_one(tmp_path):
    assert doctor.course_lm_finding(tmp_path).verdict == MEND
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
    assert doctor.course_lm_finding(tmp_path).verdict == FINE
    (tmp_path / "SHA256SUMS").write_text(f"{digest} *model.safetensors\n{digest}  config.json\n")
    (tmp_path / "model.safetensors").write_bytes(b"other")
    finding = doctor.course_lm_finding(tmp_path)
    assert finding.verdict == MEND and "git checkout -- data/course_lm" in finding.remedy
    assert "model.safetensors is damaged" in finding.found and "config.json is missing" in finding.found


def test_minutes_scale_with_the_speed_of_the_machine():
    lessons = {"00_a": {"run": {"minutes": 2.0, "gflops": 100.0}}, "01_b": {"run": {"minutes": 3.0, "gflops": None}}}
    measured, expected = doctor.predicted_minutes(lessons, gflops=50.0)
    assert measured == {"00_a": 2.0, "01_b": 3.0}
    assert expected == {"00_a": 4.0, "01_b": 3.0}
    table = Checkup(gflops=50.0, measured_minutes=measured, expected_minutes=expected).minutes()
    assert list(table["predicted here [min]"]) == [4.0, 3.0]


def test_the_probe_measures_a_speed():
    assert doctor.speed_probe(seconds=0.0, size=64) > 0


def test_what_is_wrong_is_printed_with_its_remedy():
    checkup = Checkup([Finding("disk", "0.1 GB free", MEND, "Make room."), Finding("Python", "3.12")])
    assert not checkup.ok
    assert checkup.brief().splitlines() == ["[mend] disk: 0.1 GB free", "       Do: Make room.",
                                            "1 thing must be mended before the course runs."]
    assert "[fine] Python: 3.12" in str(checkup)


def test_a_wrong_setting_is_a_finding_and_the_exit_code_is_1(monkeypatch):
    monkeypatch.setenv("COURSE_MODE", "quick")
    done = subprocess.run([sys.executable, "-m", "utils.doctor"], cwd=doctor.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "COURSE_MODE is 'quick'" in done.stdout and "1 thing must be mended" in done.stdout


def test_the_folder_looked_at_is_the_repository():
    assert Path(doctor.__file__).resolve().is_relative_to(doctor.ROOT) and (doctor.ROOT / "requirements.txt").exists()
