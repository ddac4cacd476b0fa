# SPDX-License-Identifier: Apache-2.0
"""The order of files is the structure: a file imports only files listed above it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import firstlm

ROOT = Path(firstlm.__file__).parent

# A new file gets its place here; `__init__` alone may name them all.
FLOORS = {
    "errors": "ground",
    "results": "ground",
    "options": "ground",
    "config": "ground",
    "command_config": "ground",
    "processes": "mechanism",
    "layers": "mechanism",
    "cut": "mechanism",
    "routers": "mechanism",
    "policies": "mechanism",
    "baselines": "mechanism",
    "token_level": "mechanism",
    "decisions": "mechanism",
    "inputs": "mechanism",
    "lora": "mechanism",
    "cache": "mechanism",
    "graphs": "mechanism",
    "slabs": "mechanism",
    "capture": "mechanism",
    "onednn": "mechanism",
    "replays": "mechanism",
    "fast_batch": "mechanism",
    "packing": "mechanism",
    "prefetch": "mechanism",
    "engine": "mechanism",
    "routing": "mechanism",
    "pretrained": "artifact",
    "model_card": "artifact",
    "thresholds": "artifact",
    "artifact_files": "artifact",
    "choices": "artifact",
    "artifact": "artifact",
    "model": "artifact",
    "generate": "loop",
    "batching": "loop",
    "scheduler": "loop",
    "arms": "loop",
    "short_gguf": "work",
    "rows": "work",
    "examples": "work",
    "corpus": "work",
    "data": "work",
    "masks": "work",
    "metrics": "work",
    "bertscore": "work",
    "tasks": "work",
    "scoreboard": "work",
    "journal": "work",
    "losses": "work",
    "probes": "work",
    "kv_probe": "work",
    "verdicts": "work",
    "adapters": "work",
    "importance": "work",
    "healing": "work",
    "clusters": "work",
    "rates": "work",
    "interrupts": "work",
    "trainer": "work",
    "calibration": "work",
    "starts": "work",
    "phases": "work",
    "train": "work",
    "eval_policies": "work",
    "evaluate": "work",
    "balance": "work",
    "eval_command": "work",
    "peers": "work",
    "cells": "work",
    "bench": "work",
    "diagnose": "work",
    "vllm_wishes": "edges",
    "vllm_folder": "edges",
    "vllm_routing": "edges",
    "vllm_plugin": "edges",
    "vllm_models": "edges",
    "inspect_artifact": "edges",
    "generate_command": "edges",
    "api": "edges",
    "description": "edges",
    "server": "edges",
    "serve": "edges",
    "export": "edges",
    "sections": "edges",
    "scored": "edges",
    "summary": "edges",
    "figures": "edges",
    "report": "edges",
    "harness": "edges",
    "jobs": "edges",
    "matrix": "edges",
    "experiment": "edges",
    "demo": "edges",
    "cli": "edges",
    "__main__": "edges",
}
MADE_OF = {"server": {"fastapi"}, "vllm_models": {"vllm"}}  # what a file cannot be written without
ALONE = ["__main__", "vllm_models"]  # the second is imported by vLLM, which has its own environment
ORDER = list(FLOORS)
FILES = [name for name in ORDER if (ROOT / f"{name}.py").exists()]
INDEPENDENT = {"train", "evaluate", "bench", "diagnose"}  # uses of the loop; none knows another
HEAVY = {"bert_score", "datasets", "fastapi", "matplotlib", "rich", "tensorboard", "vllm"}


def test_the_design_page_has_every_file_on_its_floor() -> None:
    page = (Path(__file__).parent.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+)(?:: \w+)? \| (`.*) \|$", page, flags=re.MULTILINE)
    found = {file: floor for floor, files in rows for file in re.findall(r"`(\w+)`", files)}
    assert found == {file: floor for file, floor in FLOORS.items() if file != "__main__"}


def is_for_types_only(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imports(node: ast.AST, into_functions: bool = True) -> Iterator[str]:
    """Yield dotted names that a file imports at run time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from (f"{module}.{alias.name}" for alias in child.names)
        elif is_for_types_only(child):
            yield from imports(ast.Module(child.orelse, []), into_functions)  # type: ignore[attr-defined]
        elif into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, into_functions)


def own_files(tree: ast.AST) -> set[str]:
    """Return the files of firstlm that a file imports; relative imports count as '.'."""
    found = set()
    for name in imports(tree):
        parts = name.split(".")
        if name.startswith("."):
            found.add(".")
        elif parts[0] == "firstlm" and len(parts) > 1 and parts[1] not in firstlm.__all__:
            found.add(parts[1])
    return found


def violations(name: str, tree: ast.AST) -> list[str]:
    allowed = set(ORDER[: ORDER.index(name)])
    if name in INDEPENDENT:
        allowed -= INDEPENDENT
    return sorted(own_files(tree) - allowed)


def tree_of(name: str) -> ast.AST:
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def test_every_file_has_a_place():
    files = {str(file.relative_to(ROOT).with_suffix("")) for file in ROOT.rglob("*.py")}
    assert files - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_files_above_it(name):
    assert violations(name, tree_of(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_are_imported_where_they_are_used(name):
    at_module_level = {module.split(".")[0] for module in imports(tree_of(name), False)}
    assert at_module_level & HEAVY <= MADE_OF.get(name, set())


def test_the_order_of_floors_is_the_order_of_files():
    floors = list(dict.fromkeys(FLOORS.values()))
    assert floors == ["ground", "mechanism", "artifact", "loop", "work", "edges"]
    assert sorted(ORDER, key=lambda name: floors.index(FLOORS[name])) == ORDER


@pytest.mark.parametrize(
    ("name", "code", "wrong"),
    [
        ("routers", "from firstlm.model import FirstModel", ["model"]),
        ("routers", "import firstlm.cli", ["cli"]),
        ("routers", "def f():\n    from firstlm import train", ["train"]),
        ("routers", "from .model import FirstModel", ["."]),
        ("train", "from firstlm.evaluate import run", ["evaluate"]),
        ("routers", "if TYPE_CHECKING:\n    from firstlm.model import FirstModel", []),
        ("routers", "from firstlm.errors import FirstError", []),
    ],
)
def test_the_check_sees_imports_that_go_up(name, code, wrong):
    assert violations(name, ast.parse(code)) == wrong


@pytest.mark.parametrize(
    ("code", "names"),
    [
        (
            "import firstlm.cli; assert firstlm.cli.main(['train', '--help']) == 0",
            {"torch", "transformers", "numpy", "peft"},
        ),
        ("import firstlm.report", {"firstlm.model", "transformers.modeling_utils"}),
    ],
    ids=["the command line starts without torch", "results are read without a model"],
)
def test_what_is_heavy_is_not_loaded(code, names):
    code = f"import sys\n{code}\nprint(sorted({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_are_there_whatever_was_imported_first():
    code = (
        "import importlib, firstlm;"
        f"[importlib.import_module('firstlm.' + name) for name in {FILES} if name not in {ALONE}];"
        "import types;"
        "assert set(firstlm.__all__) <= set(dir(firstlm));"
        "print([n for n in firstlm.__all__"
        " if isinstance(getattr(firstlm, n), types.ModuleType)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
