"""The kernels' tests on 64-bit ARM, emulated: the extension cross-compiled, Python and its packages for ARM, qemu.

    dpkg --add-architecture arm64 && apt-get update && apt-get install g++-aarch64-linux-gnu qemu-user
    python sparsepack/tests/arm.py FOLDER [sparsepack/tests/test_native.py -k rounded ...]

Debian's or Ubuntu's packages and wheels of the running environment's versions are fetched into FOLDER once; the
extension is built anew. The commands of the first line need root. By default those tests of the kernels, of decoding
and of embeddings run that start no other interpreter."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from extension import built

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
TORCH = "torch<2.9"  # Newer wheels for ARM bring CUDA.
PLATFORMS = (
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)
# what each can run
CPUS = {
    "max": ["neon_dotprod", "neon", "scalar"],
    "cortex-a53": ["neon", "scalar"],
}
NEEDED = ("sparsellm", "hypothesis", "pytest", "pytest-timeout")
TESTS = (
    "sparsepack/tests/test_native.py",
    "tests/runtime/test_decode.py",
    "tests/runtime/test_scaled_embeddings.py",
)
NOT_HERE = "not forked"  # these start another interpreter

USE = "import pathlib, sys; from extension import use; library = use(pathlib.Path(sys.argv[1])); "
ASK = "print(*(name for name, supported in library.instruction_sets() if supported))"
RUN = "import pytest; sys.exit(pytest.main(sys.argv[2:]))"


def once(directory: Path, fill: Callable[[Path], None]) -> Path:
    """A directory that is filled if it is not there; it has its name only when it is full."""
    if not directory.exists():
        unfinished = directory.with_name(f"{directory.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        fill(unfinished)
        unfinished.rename(directory)
    return directory


def system(directory: Path) -> None:
    """Python and the libraries it needs, unpacked."""
    packages = directory / "packages"
    packages.mkdir()
    needed = output(
        "apt-cache",
        "depends",
        "--recurse",
        "--important",
        "python3:arm64",
        "libstdc++6:arm64",
    )
    names = sorted(
        {
            line
            for line in needed.split("\n")
            if re.fullmatch(r"[a-z0-9][^ ]*:arm64", line)
        }
    )
    subprocess.run(["apt-get", "download", "-qq", *names], cwd=packages, check=True)
    (directory / "usr/lib").mkdir(parents=True)
    (directory / "lib").symlink_to("usr/lib")
    for package in packages.glob("*.deb"):
        content = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True
        ).stdout
        subprocess.run(
            ["tar", "-xf", "-", "-C", directory, "--keep-directory-symlink"],
            input=content,
            check=True,
        )


def wheels(python: str, directory: Path) -> None:
    """What the tests import, in the versions of this environment, for a version of Python."""
    named = [
        TORCH,
        *(
            f"{name}=={version(name)}"
            for name in sorted(needs(NEEDED))
            if name != "torch"
        ),
    ]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--target", directory, "--python-version", python, *platforms]
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        *target,
    ]
    subprocess.run([*install, *named], check=True)


def needs(packages: Iterable[str]) -> set[str]:
    """Packages of this environment and all that they require, without CUDA and without our own two."""
    names: set[str] = set()
    waiting = [Requirement(package) for package in packages]
    while waiting:
        asked = waiting.pop()
        for requirement in map(
            Requirement, [asked.name, *(requires(asked.name) or [])]
        ):
            marker, name = requirement.marker, canonicalize_name(requirement.name)
            if marker and not any(
                marker.evaluate({"extra": extra}) for extra in asked.extras or {""}
            ):
                continue
            if name not in names and not name.startswith(
                ("nvidia-", "cuda-", "triton")
            ):
                names.add(name)
                waiting.append(requirement)
    return names - {"sparsellm", "sparsepack"}


def output(*command: str | Path, **environment: str) -> str:
    return subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    arguments, tests = parser.parse_known_args()
    folder = arguments.folder.resolve()
    root = once(folder / "root", system)
    python = next((root / "usr/bin").glob("python3.[0-9]*"))
    site = once(folder / "site", partial(wheels, python.name.removeprefix("python")))
    extension = built(folder, COMPILER, "-O3", "-fvisibility=hidden")
    emulated = ["qemu-aarch64", "-L", root, python]
    home = {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": f"{site}:{ROOT / 'src'}:{ROOT / 'sparsepack/src'}:{ROOT / 'sparsepack/tests'}:{ROOT}",
    }
    for cpu, expected in CPUS.items():
        names = output(
            *emulated, "-c", USE + ASK, extension, QEMU_CPU=cpu, **home
        ).split()
        if names != expected:
            sys.exit(f"on {cpu} the extension runs {names}, not {expected}")
        sys.stdout.write(f"{cpu}: {' '.join(names)}\n")
        sys.stdout.flush()
    chosen = tests or [*TESTS, "-k", NOT_HERE]
    run = [*emulated, "-c", USE + RUN, extension, "-p", "no:cacheprovider", *chosen]
    sys.exit(subprocess.run(run, env=os.environ | home, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
