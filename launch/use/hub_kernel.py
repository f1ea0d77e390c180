"""The scans as a kernel repository of the Hugging Face hub, which the `kernels` library loads without this package.

`python -m evmamba.launch.use.hub_kernel FOLDER` (`make hub-kernel`) writes FOLDER/build/torch-universal/evmamba_scan,
the files of `kernels/` as they are, beside the metadata that the library asks for. It names the package by that
metadata's id, and `kernels/ops.py` the operators by the package: several versions live side by side in one process.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import evmamba
from evmamba.errors import UserError
from evmamba.files import write_errors

NAME = "evmamba-scan"
MODULE = NAME.replace("-", "_")
SOURCES = Path(evmamba.kernels.__file__).parent


def build(folder: Path) -> Path:
    """Write the repository and return the folder of its build.

    Raises:
        UserError: there is a build already, or it cannot be written.
    """
    variant = folder / "build" / "torch-universal"
    if variant.exists():
        raise UserError(f"{variant} exists; remove it first")
    files = [*sorted(SOURCES.glob("*.py")), *sorted(SOURCES.glob("tuned/*.json"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    metadata = {
        "id": f"{MODULE}_{digest}",
        "name": NAME,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {
            "type": "cpu"
        },  # the least that all machines have; Triton's kernels are compiled where there is a GPU
    }
    with write_errors(variant):
        for file in files:
            target = variant / MODULE / file.relative_to(SOURCES)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return variant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the scans as a kernel repository of the Hugging Face hub.")
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args().folder))
