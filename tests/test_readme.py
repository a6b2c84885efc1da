"""What the README says is so."""

from __future__ import annotations

import re
import signal
from dataclasses import fields as dataclass_fields
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

import weaver
from weaver import job as job_module
from weaver.cli import _ENDING_SIGNALS, _parser
from weaver.embedded.identity import score
from weaver.job.parse import _JOB_SITES, job_from_mapping

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_examples_are_short_and_run_one_after_another(tmp_path, monkeypatch):
    first, attached = blocks("python")
    assert len(first.splitlines()) < 15 and len(attached.splitlines()) < 12
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    assert Image.open(tmp_path / "woven.png").size == (512, 512)
    assert names["result"].reconstruction_psnr > 15
    exec(compile(attached, "README.md", "exec"), names)
    assert names["picture"].size == (64, 64)
    for concept, mask in zip((names["cat"], names["panda"]), names["masks"], strict=True):
        found = score(names["picture"], mask.numpy(), concept.name)
        assert found["own"] > found["base"] and found["own"] > found["others"], f"{concept.name}: {found}"


def test_every_exit_code_of_a_signal_is_told():
    told = README[README.index("Exit codes:") :].split("\n\n")[0]
    codes = [128 + getattr(signal, name) for name in (*_ENDING_SIGNALS, "SIGINT")]
    assert all(f" {code} " in " ".join(told.split()) for code in codes)
    assert all(str(code) in _parser().epilog for code in codes)


def test_the_table_lists_the_sites_that_a_job_takes():
    row = next(line for line in README.splitlines() if line.startswith("| `fusion`"))
    listed = row[row.index("`sites`:") :].split(", the parts")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) - {"sites"} == set(_JOB_SITES)


def test_what_the_text_says_of_templates_runs(tiny_pipe, concepts):
    """The calls of the paragraph below the examples, as they stand there."""
    code = re.findall(r"`([^`\n]+)`", README[README.index("This draws from noise") :])
    features, scheduler, call = code[:3]
    masks, prompt = torch.ones(1, 32, 32), "a dog and a cat"
    names = {name: getattr(weaver, name) for name in weaver.__all__}
    names |= {"pipe": StableDiffusionPipeline(**tiny_pipe.components, requires_safety_checker=False), "prompt": prompt}
    names |= {"template": Image.new("RGB", (32, 32), "orange"), "concepts": concepts[:1], "masks": masks}
    exec(f"plan = FusionPlan.build(pipe, concepts, masks, prompt=prompt, {features})\n{scheduler}", names)
    with weaver.attach(names["pipe"], names["plan"]):
        assert eval(call, names).images[0].size == (32, 32)


def test_no_line_of_text_is_over_120_columns():
    assert [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_the_job_is_a_job(tmp_path):
    (tmp_path / "pictures" / "my-cat").mkdir(parents=True)
    for name in ("rex.safetensors", "my-mountains.safetensors", "watercolour.safetensors"):
        (tmp_path / name).write_bytes(b"")
    job = job_from_mapping(yaml.safe_load(blocks("yaml")[0]), folder=tmp_path)
    assert [spec.name for spec in job.everyone] == ["cat", "rex", "my-mountains"]


def test_the_table_names_every_field():
    table = README[README.index("| field |") :]
    called = {"suppression": "lambda", "inversion_prompt": "inversion.prompt", "concepts": "concepts[]"}
    called |= {"resnet_window": "ResNet", "attention_window": "attention features", "settings": "TrainSettings"}
    for name in (
        "Job",
        "TemplateSpec",
        "ConceptSpec",
        "TrainSpec",
        "MaskSpec",
        "MasksSpec",
        "TextSpec",
        "StyleSpec",
        "FusionSpec",
    ):
        for field in dataclass_fields(getattr(job_module, name)):
            assert called.get(field.name, field.name) in table, f"{name}.{field.name}"


@pytest.mark.parametrize("command", ["demo", "run", "masks", "estimate"])
def test_the_command_line_has_what_is_shown(command):
    shown = re.search(rf"^weaver {command} (.*)$", README, re.MULTILINE).group(1)
    help_text = _parser()._subparsers._group_actions[0].choices[command].format_help()
    assert all(option in help_text for option in re.findall(r"--[a-z]+", shown))


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_the_layout_names_what_exists_and_every_module():
    layout = README[README.index("## Where things are") : README.index("## What it does not do yet")]
    for name in re.findall(r"`((?:weaver|weaver_kernels|tests)/[\w/.*]*)`", layout):
        assert list(ROOT.glob(name.rstrip("/"))), name
    basic = {"__init__.py", "__main__.py", "version.py", "errors.py"}
    modules = {file.name for file in (ROOT / "weaver").glob("*.py")} - basic
    assert [name for name in sorted(modules) if not re.search(rf"[`/]{name}`", layout)] == []
