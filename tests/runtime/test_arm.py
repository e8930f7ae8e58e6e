"""The extension builds for 64-bit ARM. Nobody would notice otherwise: where it does not build, torch does its work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime.arm import COMPILER, extension, output

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}; Debian has it in g++-aarch64-linux-gnu"
)


@needs_compiler
def test_the_extension_builds_for_arm_with_the_dot_product_in_it(tmp_path: Path) -> None:
    built = extension(tmp_path, "-O1")
    assert "PyInit__kernels" in output(COMPILER.replace("g++", "nm"), "--dynamic", built)
    assert "\tsdot" in output(COMPILER.replace("g++", "objdump"), "--disassemble", built)
