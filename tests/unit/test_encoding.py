"""Text is UTF-8 on every machine, whatever its locale."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
POSITION = {"read_text": 0, "write_text": 1, "open": 2}  # of the argument `encoding`, in pathlib
CHILDREN = ("run", "Popen", "check_output")


def unencoded(path: Path) -> list[str]:
    """Calls that read or write text in the locale's encoding."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        given = any(keyword.arg == "encoding" for keyword in node.keywords)
        words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if name == "open":
            modes = {word for word in words if isinstance(word, str) and word.strip("rwxab+") == ""}
            of_a_file = bool(modes) or not node.args
            if of_a_file and not given and not any("b" in mode for mode in modes):
                calls.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
        elif name in POSITION and not given and len(node.args) <= POSITION[name]:
            calls.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
        elif name in CHILDREN and any(keyword.arg == "text" for keyword in node.keywords):
            calls.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}(text=True)")
    return calls


def test_every_text_file_and_every_child_process_has_its_encoding_named() -> None:
    paths = [path for folder in ("mlinterf_ds", "tools", "launch") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    assert [call for path in paths for call in unencoded(path)] == []
