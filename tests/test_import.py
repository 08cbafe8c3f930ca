"""The package as a whole: what importing it costs, and which file may know which."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.isolated import ROOT, python

PACKAGE = ROOT / "primexec"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("jax", "triton", "onnx", "onnxruntime", "transformers", "torch._inductor", "torch._dynamo")

# From the top to the bottom: a file imports only files that stand further down.
LAYERS = (
    "testing.conftest", "testing.test_executor", "testing", "testing.suite", "testing.programs", "testing.training",
    "testing.exploration", "testing.checks", "testing.oracle", "testing.families", "testing.determined",
    "testing.samples_whole", "testing.samples", "testing.values", "testing.regions", "testing.report",
    "testing.tolerance",
    "primexec", "compare", "repro", "bisection", "divergence", "runs", "slices", "rounding", "exact", "ulp",
    "dynamo", "api", "explain", "inspection", "cache", "guards", "descriptions", "again", "autograd", "batched",
    "twice", "replayed", "pipeline",
    "runtime", "verify_plan", "partition", "refusals", "executors",
    "executors.registry", "executors.llvm.executor", "executors.llvm.library", "executors.llvm.left",
    "executors.llvm.judge", "executors.llvm.own", "executors.llvm.late_views",
    "executors.llvm.convolution", "executors.llvm.windows",
    "executors.llvm.products", "executors.llvm.measured", "executors.llvm.matmul",
    "executors.llvm.verify_memory", "executors.llvm.in_place", "executors.llvm.arena",
    "executors.llvm.short_rows", "executors.llvm.stencils",
    "executors.llvm.ordered", "executors.llvm.columns", "executors.llvm.tiles",
    "executors.llvm.codegen", "executors.llvm.ahead", "executors.llvm.codes", "executors.llvm.pieces",
    "executors.llvm.memory", "executors.llvm.addresses",
    "executors.llvm.segments", "executors.llvm.spans",
    "executors.llvm.fuse", "executors.llvm.materialize", "executors.llvm.layout", "executors.llvm.build",
    "executors.llvm.checks", "executors.llvm.contraction", "executors.llvm.stencil", "executors.llvm.schedule",
    "executors.llvm.writes",
    "executors.llvm.indirect", "executors.llvm.piecewise", "executors.llvm.maps",
    "executors.llvm.costs", "executors.llvm.reductions", "executors.llvm.twister", "executors.llvm.precision",
    "executors.llvm.instructions",
    "executors.llvm.ir", "executors.llvm.repeats", "executors.llvm.launch", "executors.llvm.entry",
    "executors.llvm.pool", "executors.llvm.profiling",
    "executors.llvm.threads", "executors.llvm.engine", "executors.llvm.vmath", "executors.llvm.vmath.special",
    "executors.llvm.vmath.trigonometry", "executors.llvm.vmath.binary", "executors.llvm.vmath.elementary",
    "executors.llvm.vmath.core", "executors.llvm.vmath.constants", "executors.llvm.emit", "executors.llvm.target",
    "executors.llvm.sleef",
    "executors.llvm", "executors.numpy_ref", "executors.aten", "executors.bindings", "executors.base",
    "lowering", "lowering.program", "lowering.expand", "lowering.operands", "lowering.rules_special",
    "lowering.rules_grid",
    "lowering.rules_backward", "lowering.rules_whole", "lowering.rules_resampling", "lowering.rules_indexing",
    "lowering.rules",
    "passes", "passes.[!e]*", "passes.emission", "verify", "placement",
    "prims.__main__", "prims", "prims.[!b]*", "prims.base",
    "reference", "reference.pointwise", "reference.shape", "reference.reduction", "reference.indexing",
    "reference.contraction", "reference.pooling", "reference.scan", "reference.fft", "reference.linalg",
    "reference.creation", "reference.effects", "reference.special", "reference.dtypes", "reference.registry",
    "graphs", "capture", "random_state", "paths", "left_behind", "captured", "joint", "identities", "instances", "cut",
    "tracer", "entrances", "gradients", "fake_calls", "calls", "parts", "literals", "arrays", "higher_order", "sizes",
    "decided_first", "number_inputs", "functions", "numbers",
    "rehearsal", "decisions", "draws", "conditions", "effects", "shadow", "references", "reads", "reaching",
    "record", "cached_calls", "imports", "namespaces", "contents", "bytecode", "appended", "lookups", "stand_ins",
    "origins", "value_checks", "statics", "program", "opcodes", "config",
    "_torch_packed", "_torch_capture", "_torch_formulas", "_torch_fake", "_torch_flag", "_torch_rules",
    "_torch_autograd", "_torch_dynamo", "_torch", "errors", "progress",
)  # fmt: skip

PRIVATE = re.compile(
    r"torch\._(C|dynamo|functorch|inductor|subclasses|prims|refs|decomp|guards|higher_order_ops|ops|library|export)\b"
)


def test_import_is_light() -> None:
    done = python(f"""
import sys, torch
before = set(sys.modules)
import primexec
print([name for name in {HEAVY} if name in set(sys.modules) - before])
print(hasattr(primexec, "__version__"), sorted(set(primexec.__all__) - set(dir(primexec))))
""")
    assert (done.stdout, done.stderr) == ("[]\nTrue []\n", "")


def test_first_call_imports_no_compiler() -> None:
    done = python("""
import sys, torch, primexec
before = set(sys.modules)
primexec.make_traced(lambda x: torch.nn.functional.linear(x, x) + 1)(torch.ones(2, 2))
print([n for n in ("jax", "triton", "onnx", "torch._inductor.compile_fx") if n in set(sys.modules) - before])
""")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def module_of(file: Path) -> str:
    """`executors.base`, and `primexec` for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "primexec"


def layer_of(module: str) -> int:
    for i, name in enumerate(LAYERS):
        if fnmatch(module, name):
            return i
    raise AssertionError(f"{module} has no place in LAYERS")


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) for each import that runs, inside functions too."""
    tree = ast.parse(file.read_text())
    for_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for_types.update(n for statement in node.body for n in ast.walk(statement))
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [f if is_module(f) else str(node.module) for f in full]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "primexec":
                yield node.lineno, name.removeprefix("primexec.") if "." in name else "primexec"


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_run_downward(file: Path) -> None:
    mine = layer_of(module_of(file))
    upward = [f"line {line}: {name}" for line, name in imports_of(file) if layer_of(name) <= mine]
    assert upward == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_stand_at_the_top(file: Path) -> None:
    tree = ast.parse(file.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = [n.lineno for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert late == []


def test_private_modules_of_torch_are_touched_in_one_file() -> None:
    found = [
        f"{module_of(file)}:{number}: {line.strip()}"
        for file in FILES
        if not file.name.startswith("_torch")
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if PRIVATE.search(line)
    ]
    assert found == []


def test_environment_is_read_in_one_file() -> None:
    found = [module_of(f) for f in FILES if re.search(r"\b(environ|getenv)\b", f.read_text())]
    assert found == ["config"]


@pytest.mark.parametrize("folder", ["primexec", "tests", "benchmarks", "examples"])
def test_files_are_short(folder: str) -> None:
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in (ROOT / folder).rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 500} == {}
