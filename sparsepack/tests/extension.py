"""The extension, compiled in other ways than the installation does it, and used in its place."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

NAME = "sparsepack._kernels"
SOURCES = Path(__file__).parents[1] / "src/sparsepack/_native"
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-pthread",
    "-ffp-contract=off",
    "-DPy_LIMITED_API=0x030B0000",
]


def built(folder: Path, compiler: str, *flags: str) -> Path:
    """The extension, compiled into a folder."""
    out = folder / "_kernels.abi3.so"
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(
        [compiler, *FLAGS, *flags, include, *sorted(SOURCES.glob("*.cpp")), "-o", out],
        check=True,
    )
    return out


def use(path: Path) -> ModuleType:
    """Makes an extension the one that the library imports."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def child(
    program: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A program that another interpreter has run."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
