"""Who may import whom: the parts of the house keep their borders.

The first half reads the imports of every source file (those under TYPE_CHECKING do
not count); the second half imports the light parts in fresh interpreters and looks
for what must not have come along.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = [REPOSITORY / name for name in ("protos", "client", "model", "server")]
ENGINE = "salver.server.engine"
WORKER = tuple(
    f"{ENGINE}.{name}"
    for name in (
        *("adapter_startup", "attention_rows", "batch", "device_memory", "device_startup", "draft_model"),
        *("encoder_runner", "encoder_startup", "gpu_gauges", "graphs", "launching", "rank", "ranks"),
        *("readouts", "roofline", "runner", "sizes", "source_reader", "startup", "updates", "weight_staging"),
        "worker",
    )
)  # fmt: skip
PURE = (
    "salver.server.step_times",
    *(
        f"{ENGINE}.{name}"
        for name in (
            *("accounting", "beam", "beam_groups", "blocks", "changes", "config", "core", "cross_cache"),
            *("drafts", "errors", "inline", "overlap", "request", "schedule", "scheduler", "sequence"),
            *("step_budget", "waiting"),
        )
    ),
)
# Of salver.model, what the front process uses.
MODEL_FRONT = tuple(
    f"salver.model.{name}"
    for name in (
        *("tokenizer", "chat_template", "config_reader", "spec", "errors", "checkpoint", "families"),
        *("rope_config", "weight_names", "encoder_spec", "encoder_config", "embedding_spec", "pooling"),
        *("generation_config", "assistant_text", "arithmetic", "hyperparameters"),
        *("classifier_spec", "decoder_heads"),
    )
)


@dataclass(frozen=True)
class Rule:
    """Modules under `part`, but for those under `apart`, never import what is under `never`."""

    part: str
    never: tuple[str, ...]
    apart: tuple[str, ...] = ()


RULES = (
    Rule("salver.v1", ("salver.client", "salver.model", "salver.server", "torch", "numpy")),
    Rule("salver.client", ("salver.model", "salver.server", "torch", "numpy")),
    Rule("salver.model", ("salver.v1", "salver.client", "salver.server", "grpc", "grpc_status", "asyncio")),
    Rule(ENGINE, ("grpc", "salver.v1", "salver.client")),
    Rule("salver.server", ("torch",), apart=WORKER),
    Rule("salver.server", ("salver.client",)),
    Rule("salver.server", ("grpc", "grpc_health", "grpc_reflection"), apart=("salver.server.rpc",)),
    *(Rule(module, ("asyncio",)) for module in WORKER),
)


def under(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """Every module of ours by name; the generated stubs too, where they exist."""
    return {module_name(path, root): path for root in ROOTS for path in sorted(root.glob("salver/**/*.py"))}


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(node: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import that can run, however deep; `from a import b` gives a and a.b."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield child.lineno, alias.name
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                above = package.split(".")[: len(package.split(".")) - child.level + 1]
                base = ".".join([*above, *([child.module] if child.module else [])])
            yield child.lineno, base
            for alias in child.names:
                yield child.lineno, f"{base}.{alias.name}"
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for alternative in child.orelse:
                yield from imports(alternative, package)
        else:
            yield from imports(child, package)


def imports_of(module: str, path: Path) -> list[tuple[int, str]]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), package))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.part} without {','.join(rule.never)}")
def test_a_part_never_imports(rule: Rule) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for module, path in sources().items()
        if under(module, (rule.part,)) and not under(module, rule.apart)
        for line, name in imports_of(module, path)
        if under(name, rule.never)
    ]
    assert not found, "\n".join(found)


def test_the_scheduler_and_its_data_need_the_standard_library_alone() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for module, path in sources().items()
        if under(module, PURE)
        for line, name in imports_of(module, path)
        if not under(name, PURE)
        and (name.partition(".")[0] not in sys.stdlib_module_names or under(name, ("asyncio",)))
    ]
    assert not found, "\n".join(found)


def test_no_regular_package_shuts_the_namespace() -> None:
    """`salver` has several roots; an __init__.py in one would hide the others."""
    shut = [str(root) for root in ROOTS if (root / "salver" / "__init__.py").exists()]
    assert not shut


def loaded_with(modules: list[str], unwanted: tuple[str, ...]) -> str:
    """Import `modules` in order in a fresh interpreter; say which first brought something unwanted."""
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    came = [m for m in {unwanted!r} if m in sys.modules]\n"
        "    if came: sys.exit(f'{name} brings {came}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else done.stderr[-2000:]


def test_the_client_is_light() -> None:
    unwanted = ("torch", "numpy", "rich", "tokenizers", "salver.model", "salver.server")
    assert loaded_with(["salver.client"], unwanted) == ""


def test_the_front_process_never_loads_torch() -> None:
    modules = [m for m in sources() if under(m, ("salver.server",)) and not under(m, WORKER)]
    assert loaded_with(["salver.server.rpc", *modules], ("torch",)) == ""


def test_what_the_front_uses_of_the_model_never_loads_torch() -> None:
    modules = ["salver.model", *(m for m in sources() if under(m, MODEL_FRONT))]
    assert loaded_with(modules, ("torch", "grpc")) == ""
