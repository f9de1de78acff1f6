"""Who may import whom, and which code the bytes of a release depend on: read off the import statements, those inside functions among them."""

import ast
from functools import cache

import pytest
import yaml

from stages.provenance import CONVERTING
from stages.settings import PROJECT, load

LAYERS = (  # each imports from itself and from those before it only
    ("kernels",),
    ("stages", "stages.errors", "stages.records"),
    ("stages.checkpoint",),
    ("stages.settings", "stages.provenance"),
    ("stages.dialects",),
    ("stages.schemes",),
    ("stages.sources", "stages.receipts"),
    ("stages.planning",),
    ("stages.conversion", "stages.models", "stages.serving", "stages.plots", "stages.stale_results", "stages.release", "stages.tokenizer",
     "stages.gemm_summary"),
    ("stages.checkup", "stages.workflow"),
    ("nodes",),
    ("stages.command_line",),
)
NODES = ("download", "inspect_format", "plan", "quantize_experts", "validate_gemm", "assemble_release", "verify_release", "evaluate", "serve_bench", "report")
MODULES = {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
           for room in ("kernels", "stages") for path in sorted((PROJECT / room).rglob("*.py")) if "vllm_plugin" not in path.parts
           and "cpu_environment" not in path.parts}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of this project that a module imports itself."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found & MODULES.keys())


def layer_of(module: str) -> int:
    room = "nodes" if module.removeprefix("stages.") in NODES else module
    fitting = [(len(name), number) for number, names in enumerate(LAYERS) for name in names if room == name or room.startswith(f"{name}.")]
    assert fitting, f"{module} stands in no layer"
    return max(fitting)[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    upward = sorted(other for other in imports(module) if layer_of(other) > layer_of(module))
    assert not upward, f"{module} imports {upward}"


def closure(*modules: str) -> set[str]:
    """Files of all modules that these import, directly or by others."""
    reached, todo = set(), list(modules)
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += imports(module)
    return {MODULES[module].relative_to(PROJECT).as_posix() for module in reached}


NO_BYTES = {  # imported by what decides bytes, but deciding none
    "kernels/__init__.py": "empty", "kernels/errors.py": "messages", "stages/errors.py": "messages", "stages/records.py": "names of fields", "stages/__init__.py": "how a stage starts",
    "kernels/decibels.py": "a figure in a printed line", "stages/provenance.py": "what is made again",
    "stages/settings/": "values that recipes state; see the test below", "stages/serving/__init__.py": "empty",
}


def test_all_code_that_decides_bytes_makes_them_anew_when_it_changes():
    named = [f"{name}/" if (PROJECT / name).is_dir() else name for name in CONVERTING]
    reached = closure("stages.download", "stages.inspect_format", "stages.plan", "stages.quantize_experts", "stages.receipts")
    left = {path for path in reached if not path.startswith(tuple(named)) and not path.startswith(tuple(NO_BYTES))}
    assert not left, f"neither in stages/provenance.py nor known to decide nothing: {sorted(left)}"


def test_snakemake_and_dvc_name_the_same_code():
    named = set(yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]["release"]["do"]["deps"])
    code = {name for name in named if name.startswith(("kernels", "stages"))}
    assert code == {*CONVERTING, "stages/assemble_release.py", "stages/release.py", "stages/serving/plugin.py", "stages/serving/vllm_plugin"}
    assert all((PROJECT / name).exists() for name in code)
    left = {path for path in closure("stages.assemble_release") if not any(path == name or path.startswith(f"{name}/") for name in code)
            and not path.startswith(tuple(NO_BYTES))}
    assert not left, f"dvc.yaml does not name {sorted(left)}"


def test_recipes_that_are_pinned_state_every_value_so_that_a_default_cannot_change_them():
    pinned = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]["release"]["foreach"]
    for row in pinned.values():
        stated: dict = {}
        chain = [row["recipe"]]
        while chain:
            file = yaml.safe_load((PROJECT / "conf" / "recipe" / f"{chain.pop()}.yaml").read_text())
            chain += [name for name in file.pop("defaults", []) if name != "_self_"]
            stated = file | stated
        assert stated.keys() == vars(load([f"recipe={row['recipe']}"]).recipe).keys(), row["recipe"]
