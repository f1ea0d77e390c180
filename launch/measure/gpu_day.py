"""Everything to measure on a GPU, within half an hour: correctness, limits, kernels, networks, tuning.

    python launch/measure/gpu_day.py --output FOLDER [--steps smoke kernels ...] [--dry-run]

Needs torch and triton, nothing installed and no network; whole networks also timm, tests also pytest. Each step is a
process of its own, so that none stops another. Every measurement is a JSON line in FOLDER/rows.jsonl, written as soon
as it is there, with floors and predictions beside it; what fails is a line with its error. Lines that a folder holds
already, without an error, are not measured again. At the end FOLDER/gpu_day.md has them as tables.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = "rows.jsonl"
Row = dict[str, Any]


def use_checkout() -> None:
    """Import evmamba from this checkout, where it is not installed: with the other floors below it."""
    folders = [str(ROOT / "evmamba"), str(ROOT)]
    first = ROOT / "evmamba" / "__init__.py"
    spec = importlib.util.spec_from_file_location("evmamba", first, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["evmamba"] = package
    spec.loader.exec_module(package)


def read(folder: Path) -> list[Row]:
    """The rows of a folder; a line that was cut off is left out."""
    rows = []
    path = folder / ROWS
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write(folder: Path, row: Row) -> None:
    """Add a row, safe from what happens next."""
    with (folder / ROWS).open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps(row)[:240], flush=True)


def done(folder: Path) -> set[tuple[str, str]]:
    """(step, name) of what has been measured."""
    return {(row["step"], row["name"]) for row in read(folder) if "error" not in row and "name" in row}


def measured(step: str, name: str, measure: Callable[[], Row]) -> Row:
    """A row; any error, Triton's among them, is one as well."""
    start = time.perf_counter()
    try:
        values = measure()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        values = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    return {"step": step, "name": name, "seconds": round(time.perf_counter() - start, 2)} | values


def run_step(step: str, conditions: Any) -> None:
    """Measure what a step yields and the folder does not have."""
    steps = importlib.import_module("evmamba.launch.measure.gpu_steps").STEPS
    have = done(conditions.output)
    for name, measure in steps[step].run(conditions):
        if (step, name) not in have:
            write(conditions.output, measured(step, name, measure))


def run_all(names: list[str], minutes: dict[str, float], output: Path, dry: bool) -> None:
    """Every step in a process of its own, each with its time."""
    for name in names:
        command = [sys.executable, str(Path(__file__).resolve()), "--output", str(output), "--step", name]
        try:
            ended = subprocess.run([*command, *(["--dry-run"] if dry else [])], timeout=60 * minutes[name], check=False)
            if ended.returncode:
                write(output, {"step": name, "error": f"the process ended with {ended.returncode}"})
        except subprocess.TimeoutExpired:
            write(output, {"step": name, "error": f"not done after {minutes[name]} minutes"})


def report(rows: list[Row]) -> str:
    """The rows as Markdown, a table a step; the last row of a name counts."""
    parts = ["# A day on a GPU"]
    for step in dict.fromkeys(row["step"] for row in rows):
        latest = {row.get("name", ""): row for row in rows if row["step"] == step}
        parts += [f"\n## {step}\n", "| | |", "|---|---|"]
        for name, row in latest.items():
            values = {key: value for key, value in row.items() if key not in ("step", "name", "seconds")}
            cell = "; ".join(f"{key} {_short(value)}" for key, value in values.items()).replace("|", "\\|")
            parts.append(f"| {name} | {cell} |")
    return "\n".join(parts) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(v)}" for key, v in value.items())
    return str(value)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure everything on this GPU.")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows.jsonl, gpu_day.md and logs")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in Triton's interpreter, with tiny sizes")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--once", help=argparse.SUPPRESS)  # one call of a shape
    options = parser.parse_args(arguments)
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    steps = importlib.import_module("evmamba.launch.measure.gpu_steps")
    conditions = steps.Conditions(output, options.dry_run)
    names = options.steps or list(steps.STEPS)
    if unknown := [name for name in names if name not in steps.STEPS]:
        parser.error(f"no step {', '.join(unknown)}; there are: {', '.join(steps.STEPS)}")
    if options.once:
        steps.once(options.once, conditions)
        return 0
    if not options.dry_run and not importlib.import_module("torch").cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU here; --dry-run tries every step on the CPU")
    if options.step:
        run_step(options.step, conditions)
        return 0
    run_all(names, {name: step.minutes for name, step in steps.STEPS.items()}, output, options.dry_run)
    rows = read(output)
    (output / "gpu_day.md").write_text(report(rows))
    failed = [f"{row['step']} {row.get('name', '')}: {row['error']}" for row in rows if "error" in row]
    print(
        f"{len(rows)} rows in {output / ROWS}; "
        + (f"{len(failed)} failed: {'; '.join(failed)}" if failed else "none failed")
    )
    return 0


if __name__ == "__main__":
    use_checkout()
    sys.exit(main())
