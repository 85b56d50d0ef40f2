"""utils.settings: variables are read, checked, and keep the hub libraries offline."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.settings import COLOURS, ROOT, Settings, banner, seed_everything, settings


@pytest.fixture
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith("COURSE_"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_the_defaults(clean):
    chosen = Settings.from_environment()
    assert (chosen.mode, chosen.llm, chosen.embedder, chosen.seed) == ("tiny", "course-lm", "minilm", 0)
    assert chosen.threads == os.cpu_count()
    assert chosen.work == ROOT / ".work"
    assert chosen.offline


@pytest.mark.parametrize("name, value, message", [
    ("COURSE_MODE", "fast", "COURSE_MODE is 'fast'; it must be one of replay, tiny, full"),
    ("COURSE_SEED", "-1", "COURSE_SEED is '-1'; it must be a whole number of at least 0"),
    ("COURSE_SEED", "one", "COURSE_SEED is 'one'"),
    ("COURSE_THREADS", "0", "COURSE_THREADS is '0'; it must be a whole number of at least 1")])
def test_a_wrong_value_is_named_with_what_it_may_be(clean, name, value, message):
    clean.setenv(name, value)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Settings.from_environment()


@pytest.mark.parametrize("variables, offline", [
    ({}, True), ({"COURSE_MODE": "replay"}, True), ({"COURSE_MODE": "full"}, False),
    ({"COURSE_LLM": "owner/model"}, False), ({"COURSE_EMBEDDER": "owner/model"}, False),
    ({"COURSE_LLM": str(ROOT)}, True)])
def test_only_hub_models_and_the_mode_full_may_use_the_network(clean, variables, offline):
    for name, value in variables.items():
        clean.setenv(name, value)
    assert Settings.from_environment().offline is offline


def test_the_work_folder_can_be_moved(clean, tmp_path):
    clean.setenv("COURSE_WORK", str(tmp_path / "elsewhere"))
    assert Settings.from_environment().work == (tmp_path / "elsewhere").resolve()


def test_importing_the_settings_switches_the_hub_libraries_off_and_sets_the_threads(clean):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"):
        clean.delenv(name, raising=False)
    program = ("import os, utils.settings, torch, faiss\n"
               "print(*(os.environ[n] for n in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE')), "
               "torch.get_num_threads(), faiss.omp_get_max_threads())")
    clean.setenv("COURSE_THREADS", "1")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"] * 5


def test_a_seed_makes_random_numbers_repeat():
    draws = []
    for _ in range(2):
        assert seed_everything(3) == 3
        draws.append((float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_the_banner_names_what_a_table_must_carry():
    line = banner((1, 2))
    for part in (f"mode {settings.mode}", f"LLM {settings.llm}", f"embedder {settings.embedder}", "seeds 1, 2"):
        assert part in line


def test_the_systems_of_one_plot_have_different_colours():
    for systems in (("keyword", "dense", "hybrid"), ("base", "RAG", "fine-tuned", "both", "oracle", "shuffled")):
        assert len({COLOURS[s] for s in systems}) == len(systems)


def test_the_root_is_the_repository():
    assert (ROOT / "requirements.txt").exists() and Path(__file__).resolve().is_relative_to(ROOT)
