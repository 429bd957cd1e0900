"""The shape of the project: who imports whom, and what files may be called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).parents[2]
SOURCES = ("llmpq", "planner", "csrc", "bench", "tests", "examples")
PACKAGES = [path.parent for top in ("llmpq", "planner") for path in sorted((ROOT / top).rglob("__init__.py"))]
BROUGHT_ALONG = {"huggingface_hub", "jinja2", "tokenizers", "tqdm"}  # by transformers and torch
NAMELESS = ("util", "utils", "helper", "helpers", "common", "misc")


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_point_downwards() -> None:
    # In a process of its own: the linter disables the loggers of the one that it runs in.
    run_python(
        "from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports\n"
        "assert lint_imports(config_filename='pyproject.toml', no_cache=True) == EXIT_STATUS_SUCCESS"
    )


@pytest.mark.parametrize("module", ["llmpq", "llmpq.spec", "planner"])
def test_import_does_not_bring_torch_along(module: str) -> None:
    run_python(f"import {module}, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules")


def test_kernels_import_no_backend_before_one_is_asked_for() -> None:
    run_python(
        "import llmpq.kernels, sys\n"
        "for name in ('llmpq._cpu', 'llmpq._cuda', 'triton',"
        " 'llmpq.kernels.backends.cuda', 'llmpq.kernels.backends.triton_gemm'):\n"
        "    assert name not in sys.modules, name\n"
    )


def test_no_file_is_called_util_helper_common_or_misc() -> None:
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if path.stem.lower() in NAMELESS] == []


def test_the_package_can_be_built_from_its_configuration() -> None:
    project = read_configuration(ROOT / "pyproject.toml")["project"]  # an error if a field is not one
    assert all((ROOT / file).is_file() for file in (*project["license-files"], project["readme"]))


def test_what_is_imported_is_declared() -> None:
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    declared = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[^\w-]", requirement)[0].replace("-", "_").lower() for requirement in declared}
    imported = set()
    for path in (path for top in ("llmpq", "planner") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                imported.add(node.module.partition(".")[0])
    assert imported - names - sys.stdlib_module_names - {"llmpq", "planner"} == BROUGHT_ALONG


PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
PICKLED_CALLS = re.compile(r".*\b(torch\.(load|save)|(all_)?gather_object|(broadcast|scatter|send|recv)_object_list)")


def test_nothing_is_unpickled() -> None:
    """What is read or received is text, numbers or tensors: nothing of it can be made to run."""
    files = [path for top in ("llmpq", "planner") for path in (ROOT / top).rglob("*.py")]
    assert len(files) > 200
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & PICKLING, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in PICKLING, path
            elif isinstance(node, ast.Call):
                assert not PICKLED_CALLS.fullmatch(ast.unparse(node.func)), path
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), path


def test_no_torch_header_in_the_extensions() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for path in sources:
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text, path
        assert "pybind11" not in text or path.stem.startswith("bindings_"), path


def modules(folder: Path) -> list[Path]:
    """The modules of a package, itself aside."""
    return sorted(path for path in folder.glob("*.py") if not path.stem.startswith("__"))


def public_names(path: Path) -> set[str]:
    """Functions and classes that a module defines, or imports from others, under the names it has for them.

    A module that is imported from its package is not among them.
    """
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            source = ROOT / node.module.replace(".", "/")
            names |= {a.asname or a.name for a in node.names if not (source / f"{a.name}.py").exists()}
    return names


def test_no_two_modules_share_a_name() -> None:
    names = Counter(path.stem for folder in PACKAGES for path in modules(folder))
    assert names
    assert [name for name, count in names.items() if count > 1] == []


def test_no_module_has_the_name_of_a_function_beside_it() -> None:
    hidden = []
    for folder in PACKAGES:
        beneath = {path.stem for path in modules(folder)}
        for beside in folder.glob("*.py"):
            hidden += [f"{beside}: {name}" for name in sorted(beneath & public_names(beside))]
    assert [name for name in hidden if not name.endswith("cli/main.py: main")] == []
