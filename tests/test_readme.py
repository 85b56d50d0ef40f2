"""README.md: its numbers are those of the results file, its commands exist, its links lead somewhere."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import course

ROOT = Path(course.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_number_between_markers_is_that_of_the_results_file():
    results = course.read_json(course.Place(ROOT).results)
    assert course.MARKER.search(README)
    assert course.fill(README, results) == README, "README.md is not current; run: python course.py results"
    assert README.count("<!-- results:") == README.count("<!-- /results -->") == len(course.MARKER.findall(README))


def test_every_result_in_the_file_belongs_to_a_lesson_that_is_there():
    lessons = course.read_json(course.Place(ROOT).results).get("lessons", {})
    assert [n for n in lessons if not (ROOT / "notebooks" / f"{n}.ipynb").exists()] == []


def test_no_measured_number_is_typed_by_hand():
    prose = re.sub(r"```.*?```|`[^`]*`|\[[^\]]*\]\([^)]*\)", "", course.MARKER.sub("", README), flags=re.DOTALL)
    prose = re.sub(r"95 % (?:confidence )?intervals?", "", prose)  # a convention, no result
    found = re.findall(r"\d[\d.,]*\s*(?:%|per cent|minutes?\b|min\b|seconds?\b|s\b|ms\b|times\b|GB\b|MB\b)", prose)
    assert not found, f"typed by hand: {found}; take them from the results file"


def test_the_commands_exist_in_the_makefile_and_in_the_program():
    targets = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"course", "test", "lab"} <= named <= targets
    assert set(re.findall(r"\bpython course\.py (?:--here )?([a-z]+)", README)) <= set(course.COMMANDS)
    assert set(course.COMMANDS) == targets - {"help"}


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_lesson_has_its_row_with_measured_minutes():
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        assert f"(notebooks/{path.name})" in README and f"results:{path.stem}/run/minutes" in README, path.name


def test_every_picture_has_a_text_instead():
    assert all(len(text) > 20 for text in re.findall(r"!\[(.*?)\]\(", README))


def test_ci_calls_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [line for line in script.splitlines() if line.startswith("make")] == ["make test"]
    assert script.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in script


def test_the_public_workflow_calls_the_two_commands_everywhere():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["course"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == ["python course.py test", "python course.py course"]
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == [f"{major}.{minor}" for major, minor in course.PYTHONS]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]


def test_the_project_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == citation["version"]
    assert project["project"]["requires-python"] == ">=3.11,<3.14"
    assert conda["dependencies"][-1] == {"pip": ["-r requirements.txt"]}
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Attribution 4.0 International" in (ROOT / "LICENSE-DATA").read_text(encoding="utf-8")


@pytest.mark.parametrize("before, replaced", [
    ("took 3.2 min on", True), ("took 812 ms", True), ("at 12:45", True), ("31 texts/s", True), ("64.5 MB", True),
    ("mode tiny · LLM course-lm · 2026-01-02 · x86_64, 2 CPU threads", True), ("recall 0.71", False)])
def test_times_and_hardware_are_replaced_before_outputs_are_compared(before, replaced):
    text = (ROOT / "tests" / "nbval_sanitize.cfg").read_text(encoding="utf-8")
    rules = re.findall(r"^regex: (.*)$\n^replace: (.*)$", text, re.MULTILINE)
    assert len(rules) == text.count("regex:") > 0
    changed = before
    for regex, replacement in rules:
        changed = re.sub(regex, replacement, changed)
    assert (changed != before) is replaced


def test_the_results_file_is_readable_json():
    path = course.Place(ROOT).results
    assert not path.exists() or json.loads(path.read_text(encoding="utf-8"))["lessons"]
