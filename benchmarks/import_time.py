"""Prints how long `import sparsellm` and `sparsellm --version` take in a fresh interpreter, beside an empty program.

python benchmarks/import_time.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "an empty program": "pass",
    "`import sparsellm`": "import sparsellm",
    "`sparsellm --version`": "import sys; from sparsellm.cli import main; sys.argv = ['sparsellm', '--version']; main()",
}


def main(rounds: int = 20) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds + 1):  # in turns; the first round fills caches of the disk and is not counted
        for name, program in PROGRAMS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    print("| | median ms | least ms |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {1000 * statistics.median(values[1:]):.0f} | {1000 * min(values[1:]):.0f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
