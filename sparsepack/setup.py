"""The compiled kernels. They are optional: without a C++ compiler installation succeeds, and torch does their work."""

import sys
from pathlib import Path

from setuptools import Extension, setup

source = Path("src/sparsepack/_native")
windows = sys.platform == "win32"
# No trapping math: GCC otherwise makes no vectors of loops with choices. It changes no bit.
flags = (
    ["/std:c++17", "/O2"]
    if windows
    else [
        "-std=c++17",
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-pthread",
    ]
)

setup(
    ext_modules=[
        Extension(
            "sparsepack._kernels",
            sources=sorted(path.as_posix() for path in source.glob("*.cpp")),
            depends=sorted(path.as_posix() for path in source.glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=flags,
            extra_link_args=[] if windows else ["-pthread"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
