"""Measure stripe through its public API alone, beside what else does the same: `python scripts/benchmark.py deploy`."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BENCHMARKS = {
    "collect": "recording attention, beside the bare forward loop, torchlens, torchvision's feature extractor",
    "stats": "moments, strength and drift of a run, beside a bare read, DuckDB, Polars, pandas; or the bootstrap",
    "train": "training SE and ASR, beside the reference recipe",
    "deploy": "inference of plain, SE and ASR networks, in training form, deployed, fused, under onnxruntime",
    "fold": "inference of a network before and after its attention is folded, eager and under onnxruntime",
    "memory": "inference with freed memory returned to the system, and kept",
    "startup": "start of python, `import stripe` and every command's --help",
    "scaling": "time and memory of recording and of moments, over the number of samples",
    "sizing": "bytes and processor time that a recording takes, by its gates",
    "coverage": "numbers of gates found in many networks, beside those expected",
}
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pyarrow", "pandas", "scipy", "duckdb", "polars", "torchlens")
BAD_INPUT = (ArithmeticError, ModuleNotFoundError, OSError, ValueError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; exit code 1 when what it measured is wrong, 2 on bad input."""
    names = "\n".join(f"  {name:9} {summary}" for name, summary in BENCHMARKS.items())
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"benchmarks:\n{names}", formatter_class=kind)
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own: see BENCHMARK --help")
    chosen = parser.parse_args(argv)
    module = import_module(f"benchmarks.{chosen.benchmark}")
    form = argparse.ArgumentDefaultsHelpFormatter
    output = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    output.add_argument("--json", type=Path, metavar="FILE", help="write the record of every round there")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a table with headings for people there")
    own = argparse.ArgumentParser(
        f"{parser.prog} {chosen.benchmark}",
        parents=[output],
        description=module.__doc__,
        formatter_class=form,
        allow_abbrev=False,
    )
    module.add_arguments(own)
    arguments = own.parse_args(chosen.arguments)
    try:
        result = module.run(arguments)
    except BAD_INPUT as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    words = output.parse_known_args(chosen.arguments)[1]
    record = {"benchmark": chosen.benchmark, "arguments": words, "device": device(), "versions": versions()}
    record["rows"] = result.rows
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    files, table = import_module("studies.table"), import_module("benchmarks.tables").table(record)
    print(table.drop(columns=[*files.PROVENANCE]).to_string(index=False))
    if arguments.csv:
        files.write(table, arguments.csv)
    return int(result.failed)


def device() -> str:
    """Name the accelerator, or else the processor and its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return the versions of python, stripe and what it is measured beside, where installed."""
    found = {"python": platform.python_version()}
    for name in ("stripe-observation", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    raise SystemExit(main())
