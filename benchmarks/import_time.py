"""Prints how long `import sparsellm` and `sparsellm --version` take in a fresh interpreter, beside an empty program.

python benchmarks/import_time.py [ROUNDS]
"""

import resource
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "an empty program": "pass",
    "`import sparsellm`": "import sparsellm",
    "`sparsellm --version`": "import sys; from sparsellm.cli import main; sys.argv[1:] = ['--version']; main()",
}


def main(rounds: int = 20) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    computed: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds + 1):  # in turns; the first round fills caches of the disk and is not counted
        for name, program in PROGRAMS.items():
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            computed[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print("| medians of fresh interpreters | ms | CPU ms |\n|---|---|---|")
    for name in PROGRAMS:
        wall, cpu = (1000 * statistics.median(each[name][1:]) for each in (seconds, computed))
        print(f"| {name} | {wall:.0f} | {cpu:.0f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
