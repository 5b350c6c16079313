"""Functions that stand in more than one method file, because each file is complete by itself.

    python tests/copies.py          one line for each copy that differs; exit code 1 if there is one
    python tests/copies.py --fix    writes all copies anew from their originals

A copy carries a mark at the end of its first line, `# copy of: methods/FILE.py::NAME`, and is equal
to the function or class of that name to the letter: docstring, comments and decorators included.
Change the original, then run --fix.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"  # copy of: (methods/\w+\.py)::(\w+)$")


class Definition(NamedTuple):
    """A function or class at the top level of a file. lines: of its source, without the mark.
    start: where it begins in the file, counted from 0, decorators included. body: its code without
    comments and docstring. mark: (file, name) of the original, or None."""

    name: str
    lines: list
    start: int
    body: str
    mark: tuple | None


def definitions(path):
    """{name: Definition} of a file."""
    text = path.read_text()
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        start = min(part.lineno for part in [node, *node.decorator_list]) - 1
        own = lines[start : node.end_lineno]
        first = node.lineno - 1 - start  # the line of `def` or `class`
        mark = MARK.search(own[first])
        own[first] = MARK.sub("", own[first])
        found[node.name] = Definition(node.name, own, start, body(node), mark and mark.groups())
    return found


def body(node):
    """The code of a definition without comments and its docstring."""
    node = ast.parse(ast.unparse(node)).body[0]
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


def files(root):
    """{"methods/NAME.py": {name: Definition}}"""
    paths = sorted((root / "methods").glob("*.py"))
    return {f"methods/{path.name}": definitions(path) for path in paths}


def check(root):
    """A sentence for everything that is wrong."""
    found = files(root)
    problems = []
    for file, parts in found.items():
        marks = (root / file).read_text().count("# copy of:")
        if marks != sum(part.mark is not None for part in parts.values()):
            problems.append(
                f"{file}: a mark `# copy of: methods/FILE.py::NAME` must end the first line of a "
                "function or class"
            )
        for part in parts.values():
            if part.mark is None:
                continue
            other, name = part.mark
            original = found.get(other, {}).get(name)
            if original is None or other == file:
                problems.append(f"{file}: {part.name} is marked as a copy of {other}::{name}, "
                                "which does not exist")  # fmt: skip
            elif original.mark:
                problems.append(f"{file}: {part.name} is marked as a copy of {other}::{name}, "
                                "which is a copy itself")  # fmt: skip
            elif original.lines != part.lines:
                problems.append(f"{file}: {part.name} differs from {other}::{name}")
    return problems + unmarked(found)


def unmarked(found):
    """A sentence for each definition without a mark that another file holds, too, with the same
    name and code."""
    first = {}
    problems = []
    for file, parts in found.items():
        for part in parts.values():
            if part.mark:
                continue
            other = first.setdefault((part.name, part.body), file)
            if other != file:
                problems.append(f"{file}: {part.name} is equal to {other}::{part.name} and carries "
                                "no mark")  # fmt: skip
    return problems


def fix(root):
    """Writes all marked copies anew, each with its mark. Returns "FILE::NAME" of those that
    changed."""
    found = files(root)
    changed = []
    for file, parts in found.items():
        lines = (root / file).read_text().splitlines()
        # From the last to the first, so that the places of the others stay valid.
        for part in sorted(parts.values(), key=lambda part: -part.start):
            original = found.get(part.mark[0], {}).get(part.mark[1]) if part.mark else None
            if original is None or original.mark or original.lines == part.lines:
                continue
            new = list(original.lines)
            first = [line.startswith(("def ", "class ")) for line in new].index(True)
            new[first] += f"  # copy of: {part.mark[0]}::{part.mark[1]}"
            lines[part.start : part.start + len(part.lines)] = new
            changed.append(f"{file}::{part.name}")
        (root / file).write_text("\n".join(lines) + "\n")
    return changed


def main(argv=None, root=ROOT):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--fix", action="store_true", help="write all copies anew from their originals")
    args = p.parse_args(argv)
    if args.fix:
        for name in fix(root):
            print(f"written: {name}")
    problems = check(root)
    print("\n".join(problems) or "all copies are equal to their originals")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
