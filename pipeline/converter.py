"""llama.cpp's own converter: where the pinned one lies, and which architectures it takes."""

import ast
import importlib.metadata
from functools import cache
from pathlib import Path

from pipeline.error import UserError

ROOT = Path(__file__).parent.parent


def converter() -> Path:
    """`convert_hf_to_gguf.py` of the llama.cpp that the installed llama-cpp-python was built from.

    Raises:
        UserError: it is not there.
    """
    if found := find_converter():
        return found
    raise UserError(f"llama.cpp's converter is not in {ROOT / '.cache'}: run 'make setup'")


def find_converter() -> Path | None:
    """The same, or None where only training is installed, as in its container."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    script = ROOT / ".cache" / f"llama.cpp-{version}" / "convert_hf_to_gguf.py"
    return script if script.is_file() else None


@cache
def architectures() -> frozenset[str] | None:
    """Those that it converts, by transformers' names of their classes; read from its table, without running it.

    None where it is not installed.
    """
    found = find_converter()
    if found is None:
        return None
    table = found.with_name("conversion") / "__init__.py"
    for statement in ast.parse(table.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "TEXT_MODEL_MAP":
            return frozenset(ast.literal_eval(statement.value))  # type: ignore[arg-type]
    raise RuntimeError(f"{table} has no TEXT_MODEL_MAP")
