"""Measure stripe through its public API, side by side with alternatives: `python scripts/benchmark.py deploy`."""

import argparse
import os
import platform
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from stripe.cli import Help
from stripe.cli.process import add_traceback, dispatch
from stripe.files import write_csv, write_json

BENCHMARKS = {
    "collect": "recording attention, against the bare forward loop, torchlens and torchvision's feature extractor",
    "stats": "the table of a run's statistics, against a bare read, DuckDB, Polars and pandas",
    "train": "training SE and ASR, against the reference recipe",
    "deploy": "inference of plain, SE and ASR networks, in training form, deployed, fused, under onnxruntime",
    "fold": "inference of a network before and after its attention is folded, eager and under onnxruntime",
    "memory": "inference with freed memory returned to the system, and with it kept",
    "startup": "start of python, `import stripe` and every command's --help",
    "scaling": "time and memory of recording and of statistics, over the number of samples",
    "sizing": "bytes and processor time that a recording takes, by its gates",
    "coverage": "number of gates found in many networks, against the number expected",
}
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pyarrow", "pandas", "scipy", "duckdb", "polars", "torchlens")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; the exit code is 1 if a result it measured is wrong, 2 on bad input."""
    names = "\n".join(f"  {name:9} {summary}" for name, summary in BENCHMARKS.items())
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"benchmarks:\n{names}", formatter_class=kind)
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help="a name from the list below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the benchmark: see BENCHMARK --help")
    return dispatch(partial(_parse, parser, argv), _run, packages=(__name__, "stripe", "benchmarks"))


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the benchmark's name, then its own arguments; `words` holds those as given, less --json and such."""
    chosen = parser.parse_args(argv)
    output = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    output.add_argument("--device", choices=("cpu", "cuda"), help="where to measure (default: a GPU if there is one)")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the record of every round to FILE")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a table with readable headings to FILE")
    add_traceback(output)
    if output.parse_known_args(chosen.arguments)[0].device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the benchmark, or a process it starts, looks for a GPU
    module = import_module(f"benchmarks.{chosen.benchmark}")
    own = argparse.ArgumentParser(
        f"{parser.prog} {chosen.benchmark}",
        parents=[output],
        description=module.__doc__,
        formatter_class=Help,
        allow_abbrev=False,
    )
    module.add_arguments(own)
    words = output.parse_known_args(chosen.arguments)[1]
    return own.parse_args(chosen.arguments, argparse.Namespace(benchmark=chosen.benchmark, words=words))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda" and device_name() is None:
        raise ValueError("--device cuda: there is no CUDA device here; leave it out to measure on the processor")
    result = import_module(f"benchmarks.{arguments.benchmark}").run(arguments)
    record = {"benchmark": arguments.benchmark, "arguments": arguments.words, "device": device()}
    record |= {"versions": versions(), "rows": result.rows}
    if arguments.json:
        write_json(arguments.json, record)
    table = import_module("benchmarks.tables").table(record)
    print(table.drop(columns=[*import_module("studies.table").PROVENANCE]).to_string(index=False))
    if arguments.csv:
        write_csv(arguments.csv, table)
    return int(result.failed)


def device() -> str:
    """Return the name of the GPU, or else of the processor with its number of cores."""
    if name := device_name():
        return name
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def device_name() -> str | None:
    """Return the name of the GPU; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Return the versions of python, of stripe and of the other libraries that are measured or used, if installed."""
    from stripe.store.writing import versions_of

    return versions_of(["stripe-observation", *LIBRARIES])


if __name__ == "__main__":
    raise SystemExit(main())
