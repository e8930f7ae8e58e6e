"""What is installed: an import that is light, and a wheel and a source archive that install without a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sparsellm import __version__
from sparsepack.compiled import extension, kernels

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"CC": "false", "CXX": "false"}
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


def installed(wheel: Path, place: Path) -> Path:
    """The interpreter of a fresh environment with a wheel; it borrows the dependencies of this one."""
    run(sys.executable, "-m", "venv", place)
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, **NO_COMPILER)
    (packages,) = place.rglob("site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("build") or not importlib.util.find_spec("twine"),
    reason="extra dist",
)
def test_wheel_and_source_install_without_a_compiler(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src"):
        source = ROOT / name
        built = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.egg-info")
        shutil.copytree(
            source, tree / name, ignore=built
        ) if source.is_dir() else shutil.copy(source, tree / name)
    build = (sys.executable, "-m", "build", "--no-isolation")
    # the wheel is built from the source archive
    run(*build, tree, "--outdir", tmp_path / "dist")
    (archive,), (wheel,) = (
        list((tmp_path / "dist").glob(ending)) for ending in ("*.tar.gz", "*.whl")
    )
    run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel)
    shutil.unpack_archive(archive, tmp_path / "source")
    run(
        *build,
        "--wheel",
        *(tmp_path / "source").iterdir(),
        "--outdir",
        tmp_path / "plain",
        **NO_COMPILER,
    )
    (plain,) = (tmp_path / "plain").glob("*.whl")
    expected = {wheel: kernels(), plain: "not compiled, torch does their work"}
    if not (shutil.which("c++") or shutil.which("cl")):
        expected.pop(wheel)
    for number, (package, said) in enumerate(expected.items()):
        python = installed(package, tmp_path / f"env{number}")
        assert str(tmp_path) in run(
            python, "-c", "import sparsellm; print(sparsellm.__file__)"
        )
        assert run(python.parent / "sparsellm", "--version").startswith(
            f"sparsellm {__version__}\nkernels: {said}"
        )
        listed = run(
            python,
            "-c",
            "import importlib.metadata as m; print(*m.files('sparsellm'), sep='\\n')",
        )
        assert {"sparsellm/py.typed", "sparsellm/app/cli.py"} <= set(
            listed.splitlines()
        )
        assert "tests" not in {line.partition("/")[0] for line in listed.splitlines()}
