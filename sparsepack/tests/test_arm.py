"""The extension builds for 64-bit ARM. Nobody would notice otherwise: where it does not build, torch does its work."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from arm import COMPILER, output
from extension import FLAGS, SOURCES


@pytest.mark.parametrize(
    "compiler", [COMPILER, f"{COMPILER}-12"]
)  # headers before 13 need another target
def test_the_extension_compiles_for_arm_with_the_dot_product(
    compiler: str, tmp_path: Path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(
            f"{compiler} is not installed; Debian has it in a package g++...-aarch64-linux-gnu"
        )
    command = [compiler, *FLAGS, f"-I{sysconfig.get_path('include')}"]
    headers = subprocess.run(
        [*command, "-xc++", "-fsyntax-only", "-include", "Python.h", "/dev/null"],
        check=False,
    )
    if headers.returncode:
        pytest.skip(
            "the headers of this Python are for its own processor only, as Debian's are"
        )
    neon = SOURCES / "integer_neon_dotprod.cpp"
    subprocess.run(
        [*command, "-fsyntax-only", *sorted(SOURCES.glob("*.cpp"))], check=True
    )
    subprocess.run([*command, "-O1", "-c", neon, "-o", tmp_path / "neon.o"], check=True)
    assert "\tsdot" in output(
        "aarch64-linux-gnu-objdump", "--disassemble", tmp_path / "neon.o"
    )
