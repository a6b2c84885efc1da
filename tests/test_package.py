from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import weaver
import weaver_kernels


def test_importing_the_package_loads_no_library():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys, weaver, weaver.errors; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there():
    for name in weaver.__all__:
        assert getattr(weaver, name) is not None
    for name, module in weaver._LAZY.items():
        assert getattr(weaver, name).__module__ == f"weaver.{module}", name
    assert set(weaver.__all__) <= set(dir(weaver))
    asked_for = {"CacheWarning", "MemoryPlan", "ddim_scheduler", "reconstruction_psnr", "sites_for"}
    assert asked_for | {"EMBEDDED", "PAPER", "PLUG_AND_PLAY", "SDXL"} <= set(weaver.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = weaver.nothing


def test_the_scheduler_and_the_kinds_of_features_have_one_home():
    homes = Counter()
    for file in Path(weaver.__file__).parent.rglob("*.py"):
        if file.name in ("__init__.py", "__main__.py"):
            continue  # they pass names on
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                homes.update(ast.literal_eval(node.value))
    assert homes["ddim_scheduler"] == homes["FEATURES"] == 1


def test_of_the_kernels_only_what_they_offer_is_used():
    for file in Path(weaver.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weaver_kernels"):
                assert node.module == "weaver_kernels", f"{file.name} imports from {node.module}"
                assert {name.name for name in node.names} <= set(weaver_kernels.__all__), file.name
