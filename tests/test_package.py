from __future__ import annotations

import subprocess
import sys

import pytest

import weaver


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
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = weaver.nothing
