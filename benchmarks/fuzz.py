"""Fuzzing: bytes and texts that nobody would write, to all that reads what others wrote.

    python -m benchmarks.fuzz                        # 100,000 inputs for each target
    python -m benchmarks.fuzz --inputs 1000000 blob key
    python -m benchmarks.fuzz --atheris blob         # guided by coverage, after pip install atheris

A target must give the truth or one of chunkcache's errors, and allocate no more than its input is
worth, as `tests/fuzzing.py` says of each. Inputs are damaged good ones, by chance; with `--atheris`
the chance is what libFuzzer makes of the lines that were reached. Input number n of a seed is the
same in every run.

Prints a table, and what was found; ends with 1 if that is anything. For memory outside of Python's
sight (torch, zstd) the table has what the process grew by.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import traceback
import tracemalloc
from random import Random

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.fuzzing import TARGETS

WARM_UP = 1000  # inputs after which the process should have what it needs
MOST_FINDINGS = 10
MOST_GROWTH = 200 << 20  # bytes


class FromBytes(Random):
    """Chance that is read from bytes, zeros behind their end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int) -> int:
        size = -(-k // 8)
        piece = self._data[self._at : self._at + size].ljust(size, b"\0")
        self._at += size
        return int.from_bytes(piece, "little") >> (8 * size - k)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def resident() -> int:
    """The most bytes of RAM that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def by_chance(name: str, inputs: int, seed: int) -> tuple[int, int, dict[str, str]]:
    """Feed a target. Returns bytes allocated at most, growth of the process, and findings."""
    target, most, base, found = TARGETS[name], 0, 0, dict[str, str]()
    for number in track(range(inputs), description=name, transient=True):
        given = target.make(Random(f"{seed}/{number}"))
        try:
            most = max(most, target.check(given))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__}: {where.filename}:{where.lineno}"
            found.setdefault(place, f"input {number}: {error!s:.300}\n{given!r:.600}")
            if len(found) == MOST_FINDINGS:
                break
        if number == min(WARM_UP, inputs - 1):
            base = resident()
    growth = resident() - base
    if growth > MOST_GROWTH:
        found["memory"] = f"the process grew by {growth} bytes"
    return most, growth, found


def by_coverage(name: str, inputs: int, seed: int) -> None:
    """Let atheris choose the inputs. Ends the process: with 0 if nothing was found."""
    import atheris

    target = TARGETS[name]
    for module in [each for key, each in sys.modules.items() if key.startswith("chunkcache.")]:
        for attribute in vars(module).values():
            if getattr(attribute, "__module__", None) == module.__name__:
                instrument(atheris, attribute)
    atheris.Setup(
        [sys.argv[0], f"-runs={inputs}", f"-seed={seed}", "-max_len=4096", "-len_control=0"],
        lambda data: target.check(target.make(FromBytes(data))),
    )
    atheris.Fuzz()


def instrument(atheris, what) -> None:
    """Let atheris see which lines of a function, or of a class's own functions, are reached."""
    functions = vars(what).values() if isinstance(what, type) else [what]
    for function in functions:
        function = getattr(function, "__func__", function)
        if hasattr(function, "__code__"):
            atheris.instrument_func(function)


def main() -> None:
    """Parse the command line, fuzz, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"unknown target {', '.join(sorted(unknown))}: use {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    tracemalloc.start()
    if options.alone:
        by_coverage(names[0], options.inputs, options.seed)
    table = Table("target", "inputs", "bytes above the input's", "process grew by", "found")
    console = Console()
    failed = False
    for name in names:
        if options.atheris:
            size = ["--inputs", str(options.inputs), "--seed", str(options.seed)]
            command = [sys.executable, "-m", "benchmarks.fuzz", name, "--alone", *size]
            failed |= bool(subprocess.run(command, check=False).returncode)
            continue
        most, growth, found = by_chance(name, options.inputs, options.seed)
        failed |= bool(found)
        for place, what in found.items():
            console.print(f"{name}: {place}\n{what}\n", markup=False, highlight=False)
        table.add_row(
            name, f"{options.inputs:,}", f"{most:,}", f"{growth >> 20} MiB", str(len(found))
        )
    if not options.atheris:
        console.print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
