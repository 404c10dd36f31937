"""What ruff does not check: it looks at docstrings of functions only."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for room in ("grasp_lightning", "callbacks") for path in (ROOT / room).rglob("*.py")
)


def parameters(node: ast.ClassDef) -> set[str]:
    """Names of what a class is made from: parameters of ``__init__``, or fields."""
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    made = next((part.args for part in functions if part.name == "__init__"), None)
    if made is None:
        fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
        return {field.id for field in fields if isinstance(field, ast.Name)}
    return {argument.arg for argument in (*made.posonlyargs, *made.args, *made.kwonlyargs)}


def test_arguments_that_docstrings_of_classes_name_exist() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                section = re.search(r"Args:\n((?: {4}.*\n|\n)*)", f"{ast.get_docstring(node)}\n")
                named = re.findall(r"^ {4}(\w+): ", section[1], re.MULTILINE) if section else []
                assert set(named) <= parameters(node), f"{path}: {node.name}"
