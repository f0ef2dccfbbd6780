"""fastercache imports on a torch whose private names are other ones: they are imported where they are used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("fastercache", "triton_kernels") for path in (ROOT / folder).rglob("*.py")]


def private_names(path: Path) -> list[str]:
    """What a module imports from torch's private modules, or by a private name, when it is imported itself."""
    found = []
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found += [name for name in (f"{node.module}.{alias.name}" for alias in node.names) if "._" in name]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("torch.") and "._" in alias.name]
        pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_torch_is_needed_for_an_import(path):
    assert private_names(path) == []
