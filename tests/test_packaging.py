"""What is declared for the package is what is in it."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The keywords that setup.py hands to setuptools."""
    found = {}
    original = setuptools.setup
    setuptools.setup = lambda **keywords: found.update(keywords)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return found


def source_files() -> list[Path]:
    """Every file of the two packages that is not made by running them."""
    files = [path for package in ("weaver", "weaver_kernels") for path in (ROOT / package).rglob("*") if path.is_file()]
    kept = [path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts]
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        tracked = {Path(line) for line in listed.splitlines()}
        kept = [path for path in kept if path in tracked]
    return kept


def test_every_file_of_the_packages_is_in_a_wheel(metadata, monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution(
        {key: metadata[key] for key in ("name", "packages", "package_data")} | {"include_package_data": False}
    )
    distribution.script_name = "setup.py"
    command = build_py(distribution)
    command.finalize_options()
    packed = {Path(source) / name for _, source, _, names in command.data_files for name in names}
    packed |= {Path(file) for _, _, file in command.find_all_modules()}
    missing = sorted(str(path) for path in source_files() if path not in packed)
    assert missing == []


def test_command_and_extras(metadata):
    assert metadata["entry_points"] == {"console_scripts": ["weaver = weaver.cli:main"]}
    assert set(metadata["extras_require"]) == {"masks", "train", "xformers", "bench", "eval", "test"}
    assert {"weaver", "weaver_kernels"} <= set(metadata["packages"])
    assert not any(package.startswith("tests") for package in metadata["packages"])


def test_triton_only_where_there_is_one(metadata):
    triton = [line for line in metadata["install_requires"] if line.startswith("triton")]
    assert len(triton) == 2 and all("platform_system" in line for line in triton)


def test_nothing_in_the_default_set_up_brings_torchvision(metadata):
    names = {
        re.split(r"[<>=;\[ ]", line)[0] for line in metadata["install_requires"] + metadata["extras_require"]["test"]
    }
    assert not names & {"torchvision", "timm", "torchmetrics", "segment-anything", "groundingdino-py", "clean-fid"}


def test_constraints_pin_every_direct_dependency_within_its_range(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    for line in metadata["install_requires"] + metadata["extras_require"]["test"] + metadata["extras_require"]["train"]:
        name, least = re.match(r"([\w.-]+)>=([\d.]+)", line).groups()
        if name.startswith("triton"):
            continue  # torch's CUDA builds pin their own
        assert name in pins, f"{name} has no pin"
        assert [int(part) for part in pins[name].split(".")] >= [int(part) for part in least.split(".")], line


def test_no_index_host_is_named():
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt", ".ci/run"):
        text = (ROOT / name).read_text()
        assert not re.search(r"--(extra-)?index-url|--find-links|https?://", text), name
