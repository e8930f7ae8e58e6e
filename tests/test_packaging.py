"""What is installed: an import that is light, wheels that run and source archives that install without a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sparsellm import __version__
from sparsepack.compiled import extension, kernels

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "pydantic",
    "yaml",
    "rich",
    "typer",
    "huggingface_hub",
)


def test_the_import_is_light() -> None:
    program = f"import sys, sparsellm; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_kernels_are_told_with_and_without_the_extension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparsepack import native

    if native.instruction_sets():
        assert kernels() == ", ".join(native.instruction_sets())
    monkeypatch.setitem(sys.modules, "sparsepack._kernels", None)
    extension.cache_clear()
    try:
        assert kernels().startswith("not compiled, torch does their work")
    finally:
        extension.cache_clear()


def run(*command: str | Path, **environment: str) -> str:
    """What a command printed; a failure shows it."""
    clean = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    } | environment
    done = subprocess.run(
        [str(word) for word in command],
        env=clean,
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def borrowing(place: Path) -> Path:
    """The interpreter of a fresh environment that borrows the dependencies of this one."""
    run(sys.executable, "-m", "venv", place)
    (packages,) = place.rglob("site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(
    any(not importlib.util.find_spec(name) for name in ("build", "twine", "auditwheel"))
    or not shutil.which("c++"),
    reason="the extra dist and a C++ compiler are needed",
)
def test_wheels_run_and_sources_install_without_compiler(tmp_path: Path) -> None:
    out = tmp_path / "dist"
    # it builds, checks, installs and runs the wheels
    assert __version__ in run(sys.executable, ROOT / "tools/wheels.py", "--out", out)
    (wheel,) = out.glob("sparsellm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sparsellm/py.typed", "sparsellm/app/cli.py"} <= set(names)
    assert "tests" not in {name.partition("/")[0] for name in names}

    python = borrowing(tmp_path / "plain")
    (archive,) = out.glob("sparsepack-*.tar.gz")
    install = (python, "-m", "pip", "install", "--no-deps")
    run(*install, archive, CC="false", CXX="false")
    ask = (
        "from sparsepack import compiled; print(compiled.__file__, compiled.kernels())"
    )
    said = run(python, "-c", ask)
    assert said.startswith(str(tmp_path))
    assert "not compiled, torch does their work" in said
