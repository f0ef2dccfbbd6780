"""Every file, module, name and link that the documents mention is there."""

from __future__ import annotations

import importlib.util
import re
from functools import reduce
from pathlib import Path

import pytest

import fastercache
from fastercache import cli, policies, shapes

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NOT_HERE = {"log.jsonl", "out/demo/", "model_index.json", "schedules/", "index.json"}
"""Files that a command writes, and those of a user's pipeline."""


def without_code(document: Path) -> str:
    return re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)


def quoted(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code(document))


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    folders = [ROOT, ROOT / "fastercache", *(path for path in (ROOT / "fastercache").iterdir() if path.is_dir())]
    named = [
        text
        for text in quoted(document)
        if re.fullmatch(r"(?:[\w.-]+/)+|(?:[\w.-]+/)*[\w-]+\.(?:py|md|h|cpp|cu|json|toml)", text)
    ]
    systems = {text for name in policies.PRESETS for text in (name, "/" + name.split("/")[1])}
    missing = [
        text
        for text in named
        if text not in NOT_HERE | systems and not any((folder / text).exists() for folder in folders)
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_that_a_document_mentions_exist(document):
    for text in quoted(document):
        match = re.match(r"(fastercache|policies|shapes)((?:\.\w+)+)", text)
        if match is None or text.endswith(".py"):
            continue
        start = {"fastercache": fastercache, "policies": policies, "shapes": shapes}[match[1]]
        try:
            reduce(getattr, match[2].strip(".").split("."), start)
        except AttributeError:
            importlib.import_module(match[1] + match[2])
    for module in re.findall(r"python -m ([\w.]+)", document.read_text()):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document)):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if heading:
            assert heading in [anchor(line) for line in re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)], link


def test_the_readme_has_every_policy_and_every_room():
    text = (ROOT / "README.md").read_text()
    rows = re.search(r"\| policy \| method \|\n(.*?)\n\n", text, re.DOTALL)[1]
    listed = {name for row in rows.splitlines()[1:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert listed == set(policies.BY_NAME) | {"teacache", "magcache", "given"}
    folders = {f"fastercache/{path.parent.name}/" for path in (ROOT / "fastercache").glob("*/__init__.py")} - {
        "fastercache/triton_kernels/"
    }
    assert all(f"`{folder}`" in text for folder in folders)
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert commands == set(re.findall(r"^\| `fastercache (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("folder", ["fastercache", "triton_kernels", "tests", "bench"])
def test_modules_that_the_code_mentions_exist(folder):
    missing = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for text in re.findall(r"`(fastercache(?:\.\w+)+)", path.read_text()):
            try:
                reduce(getattr, text.split(".")[1:], fastercache)
            except AttributeError:
                if not is_module(text):
                    missing.append(f"{path.relative_to(ROOT)}: {text}")
    assert not missing
