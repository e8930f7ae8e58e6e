"""The extension builds for 64-bit ARM. Nobody would notice otherwise: where it does not build, torch does its work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime.arm import COMPILER, output
from tests.runtime.extension import built


@pytest.mark.parametrize("compiler", [COMPILER, f"{COMPILER}-12"])  # headers before 13 need another target
def test_the_extension_builds_for_arm_with_the_dot_product_in_it(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}; Debian has it in a package g++...-aarch64-linux-gnu")
    extension = built(tmp_path, compiler, "-O1")
    assert "PyInit__kernels" in output("aarch64-linux-gnu-nm", "--dynamic", extension)
    assert "\tsdot" in output("aarch64-linux-gnu-objdump", "--disassemble", extension)
