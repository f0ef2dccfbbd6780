"""fastercache imports on a torch whose private names are other ones: they are imported where they are used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

LOADED = """
import json, sys
import fastercache
print(json.dumps([module.__file__ for name, module in sys.modules.items() if name.startswith("fastercache") and
module.__file__]))
"""


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


def test_no_private_name_of_torch_is_needed_for_an_import():
    """Of everything that `import fastercache` loads; what needs such names by itself is imported when it is first
    used."""
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = [Path(path) for path in json.loads(run.stdout) if path.endswith(".py")]
    assert len(loaded) > 30
    assert {path.name: names for path in loaded if (names := private_names(path))} == {}
