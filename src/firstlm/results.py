# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk: whole files and folders or none, and where its numbers came from.

Knows nothing about models, options or what the numbers mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

DATA_VARIABLE = "FIRSTLM_DATA"  # names the folder with data outside the project
RECORDED_PACKAGES = ("firstlm", "torch", "transformers", "peft", "accelerate", "numpy")


def check_file(path: str | Path | None) -> None:
    """Raise `OSError` if a file cannot be written there, before the work that leads to it."""
    if path is not None:
        path = Path(path).expanduser().resolve()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        there = next(parent for parent in path.parents if parent.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 so that `path` holds the old content or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write bytes so that `path` holds the old content or the new, never a part."""
    path = Path(path).expanduser().resolve()  # a link stays a link
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        with suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    _sync_folder(path.parent)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as one valid JSON document, atomically."""
    write_text(path, to_json(obj, indent=2) + "\n")


def to_json(obj: Any, indent: int | None = None) -> str:
    """Return `obj` as valid JSON text; nan and infinities, which JSON lacks, become null."""
    return json.dumps(_jsonable(obj), indent=indent, ensure_ascii=False, allow_nan=False)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error.

    When anything fails, the disk being full included, the old folder stays as it was.
    """
    path = Path(path).expanduser().resolve()  # a link stays a link
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; expected a folder, or nothing yet.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors lets nobody else read what it writes
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o777 & ~_umask())
        _swap(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def provenance(seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """Return what is needed to place a number: versions, commit, hardware, command, seed, date."""
    command = Path(sys.argv[0]).name.replace("__main__.py", "firstlm")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [command, *map(portable, sys.argv[1:])],
        "seed": seed,
        "python": platform.python_version(),
        **{name: _version(name) for name in RECORDED_PACKAGES},
        "git": _git(),
        "hardware": _hardware(),
        **extra,
    }


def portable(path: str) -> str:
    """Return a path with the data folder's place on this machine written as `$FIRSTLM_DATA`.

    Options expand it again, so that a saved run can be repeated elsewhere.
    """
    folder = os.environ.get(DATA_VARIABLE, "").rstrip("/")
    inside = bool(folder) and path.startswith(f"{folder}/")
    return f"${DATA_VARIABLE}{path[len(folder) :]}" if inside else path


def _jsonable(obj: Any) -> Any:
    """Turn tuples, paths, numpy and torch scalars into JSON values; refuse anything else."""
    if isinstance(obj, dict):
        return {str(key): _jsonable(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_jsonable(value) for value in obj]
    if isinstance(obj, bool | int | str) or obj is None:
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if hasattr(obj, "tolist"):  # numpy and torch, without importing either
        return _jsonable(obj.tolist())
    raise TypeError(f"{type(obj).__name__} can't be written as JSON.")


def _swap(new: Path, path: Path) -> None:
    """Put folder `new` at `path`; the old one is put back if that fails."""
    if not path.exists():
        new.replace(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.replace(old / path.name)
        try:
            new.replace(path)
        except BaseException:
            (old / path.name).replace(path)
            raise
    finally:
        if path.exists():  # else the old folder is all there is: keep it
            shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _version(package: str) -> str | None:
    """Return the installed version of `package`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Return commit and whether files differ from it, if the package runs from a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _hardware() -> dict[str, Any]:
    """Return CPU name, cores this process may use, memory in GiB and, if torch is loaded, GPUs."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    hardware: dict[str, Any] = {"cpu": cpu, "cores": cores, "system": platform.platform()}
    with suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        hardware["memory_gib"] = round(memory / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        hardware["threads"] = torch.get_num_threads()
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        hardware["gpu"] = [torch.cuda.get_device_name(index) for index in range(count)]
    return hardware
