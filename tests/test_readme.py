"""What the README says is so."""

from __future__ import annotations

import re
from dataclasses import fields as dataclass_fields
from pathlib import Path

import pytest
import yaml
from PIL import Image

from weaver import job as job_module
from weaver.cli import _parser
from weaver.job.parse import job_from_mapping

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The README's first block of code in a language."""
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_the_first_example_is_short_and_runs(tmp_path, monkeypatch):
    code = block("python")
    assert len(code.splitlines()) < 15
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert Image.open(tmp_path / "woven.png").size == (512, 512)
    assert names["result"].reconstruction_psnr > 15


def test_the_job_is_a_job(tmp_path):
    (tmp_path / "pictures" / "my-cat").mkdir(parents=True)
    for name in ("rex.safetensors", "my-mountains.safetensors"):
        (tmp_path / name).write_bytes(b"")
    job = job_from_mapping(yaml.safe_load(block("yaml")), folder=tmp_path)
    assert [spec.name for spec in job.everyone] == ["cat", "rex", "my-mountains"]


def test_the_table_names_every_field():
    table = README[README.index("| field |") :]
    called = {"suppression": "lambda", "inversion_prompt": "inversion.prompt", "concepts": "concepts[]"}
    called |= {"resnet_window": "ResNet", "attention_window": "attention features", "settings": "TrainSettings"}
    for name in ("Job", "TemplateSpec", "ConceptSpec", "TrainSpec", "MaskSpec", "MasksSpec", "FusionSpec"):
        for field in dataclass_fields(getattr(job_module, name)):
            assert called.get(field.name, field.name) in table, f"{name}.{field.name}"


@pytest.mark.parametrize("command", ["demo", "run", "estimate"])
def test_the_command_line_has_what_is_shown(command):
    shown = re.search(rf"^weaver {command} (.*)$", README, re.MULTILINE).group(1)
    help_text = _parser()._subparsers._group_actions[0].choices[command].format_help()
    assert all(option in help_text for option in re.findall(r"--[a-z]+", shown))


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_the_layout_names_what_exists():
    layout = README[README.index("## Where things are") : README.index("## What it does not do yet")]
    for name in re.findall(r"`((?:weaver|weaver_kernels|tests)/[\w/.*]*)`", layout):
        assert list(ROOT.glob(name.rstrip("/"))), name
