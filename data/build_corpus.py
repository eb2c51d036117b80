"""Build the embedded corpus: the Python standard library's own source, one document a definition.

Each top-level class or function of each module of the running Python's standard library becomes one JSONL document
`{"text": source, "module": path, "name": name}`. Nothing is downloaded and nothing is committed: the text is the
user's own copy. The order is by SHA-256 of (module, name), so that any prefix of the file is a fair sample of it.
The result depends on the Python version alone; its digest is printed.

    python data/build_corpus.py [OUT.jsonl]          # default data/corpus/stdlib.jsonl
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from actstore import durable

# Generated tables and vendored or test code teach a language model nothing about Python.
SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
        "encodings",
        "ensurepip",
        "site-packages",
        "dist-packages",
        "__pycache__",
    ]
)
MIN_DOCUMENT_CHARACTERS = 200  # shorter definitions are one-line aliases


def module_files(library: Path) -> Iterator[Path]:
    """Yield every module of the standard library at `library`, sorted by path, without SKIPPED_FOLDERS."""
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            yield path


def definitions(source: str) -> Iterator[tuple[str, str]]:
    """Yield (name, source text) of each top-level class and function, decorators and docstring included."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield node.name, "".join(lines[first - 1 : node.end_lineno])


def build(library: Path) -> bytes:
    """Return the corpus as JSONL bytes, UTF-8, ordered by SHA-256 of (module, name, text)."""
    documents: list[tuple[str, str]] = []
    for path in module_files(library):
        try:
            source = path.read_text("utf-8")
            found = list(definitions(source))
        except (UnicodeDecodeError, SyntaxError):  # deliberately broken files exist in some distributions
            continue
        module = path.relative_to(library).as_posix()
        for name, text in found:
            if len(text) >= MIN_DOCUMENT_CHARACTERS:
                line = json.dumps({"text": text, "module": module, "name": name}, ensure_ascii=False)
                documents.append((hashlib.sha256(f"{module}\0{name}\0{text}".encode()).hexdigest(), line))
    return "".join(line + "\n" for _, line in sorted(documents)).encode()


def main() -> None:
    """Write the corpus and print its path, size and digest."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "corpus" / "stdlib.jsonl"
    corpus = build(Path(sysconfig.get_path("stdlib")))
    durable.make_dir(out.parent)
    durable.write_new(out.parent, out.name, [corpus], replace=True)
    documents = corpus.count(b"\n")
    print(f"{out}: {documents} documents, {len(corpus)} bytes, sha256 {hashlib.sha256(corpus).hexdigest()}")


if __name__ == "__main__":
    main()
