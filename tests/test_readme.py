"""What the README and the pages in docs say is so."""

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
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LIBRARY, JOBS = (PAGES[ROOT / "docs" / name] for name in ("library.md", "jobs.md"))


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
    told = JOBS[JOBS.index("## Exit codes") :]
    codes = [128 + getattr(signal, name) for name in (*_ENDING_SIGNALS, "SIGINT")]
    assert all(f" {code} " in " ".join(told.split()) for code in codes)
    assert all(str(code) in _parser().epilog for code in codes)


def test_the_table_lists_the_sites_that_a_job_takes():
    row = next(line for line in JOBS.splitlines() if line.startswith("| `injection.sites`"))
    assert set(re.findall(r"`([\w-]+)`", row)) == set(_JOB_SITES)


def test_what_the_text_says_of_templates_runs(tiny_pipe, concepts):
    """The calls of the page on the library, as they stand there."""
    code = re.findall(r"`([^`\n]+)`", LIBRARY[LIBRARY.index("draws from noise") :])
    features, scheduler, call = code[:3]
    masks, prompt = torch.ones(1, 32, 32), "a dog and a cat"
    names = {name: getattr(weaver, name) for name in weaver.__all__}
    names |= {"pipe": StableDiffusionPipeline(**tiny_pipe.components, requires_safety_checker=False), "prompt": prompt}
    names |= {"template": Image.new("RGB", (32, 32), "orange"), "concepts": concepts[:1], "masks": masks}
    exec(f"plan = FusionPlan.build(pipe, concepts, masks, prompt=prompt, {features})\n{scheduler}", names)
    with weaver.attach(names["pipe"], names["plan"]):
        assert eval(call, names).images[0].size == (32, 32)


def test_no_line_of_text_is_over_120_columns():
    lines = [line for text in PAGES.values() for line in text.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


def test_the_job_is_a_job(tmp_path):
    (tmp_path / "pictures" / "my-cat").mkdir(parents=True)
    for name in ("rex.safetensors", "my-mountains.safetensors", "watercolour.safetensors"):
        (tmp_path / name).write_bytes(b"")
    job = job_from_mapping(yaml.safe_load(blocks("yaml")[0]), folder=tmp_path)
    assert [spec.name for spec in job.everyone] == ["cat", "rex", "my-mountains"]


def test_the_table_names_every_field():
    called = {"suppression": "lambda", "inversion_prompt": "inversion.prompt", "concepts": "concepts[]"}
    called |= {"settings": "TrainSettings", "styles": "styles[]"}
    called |= {name: f"injection.{name.removesuffix('_window')}" for name in ("resnet_window", "attention_window")}
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
            told = called.get(field.name, field.name)
            assert re.search(rf"`(injection\.)?{re.escape(told)}`", JOBS), f"{name}.{field.name}"


@pytest.mark.parametrize("command", ["demo", "run", "masks", "estimate"])
def test_the_command_line_has_what_is_shown(command):
    shown = re.search(rf"^weaver {command} (.*)$", README, re.MULTILINE).group(1)
    help_text = _parser()._subparsers._group_actions[0].choices[command].format_help()
    assert all(option in help_text for option in re.findall(r"--[a-z]+", shown))


def test_links_and_pictures_are_there():
    for page, text in PAGES.items():
        targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
        for target in targets:
            file, _, heading = target.partition("#")
            path = (page.parent / file).resolve()
            assert path.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(path.read_text(encoding="utf-8")), f"{page.name}: {target}"


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_layout_names_what_exists_and_every_module():
    layout = README[README.index("## Where things are") : README.index("## What it does not do yet")]
    for name in re.findall(r"`((?:weaver|weaver_kernels|tests)/[\w/.*]*)`", layout):
        assert list(ROOT.glob(name.rstrip("/"))), name
    basic = {"__init__.py", "__main__.py", "version.py", "errors.py"}
    modules = {file.name for file in (ROOT / "weaver").glob("*.py")} - basic
    assert [name for name in sorted(modules) if not re.search(rf"[`/]{name}`", layout)] == []
