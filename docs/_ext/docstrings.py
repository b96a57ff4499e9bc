"""This house's docstrings as reStructuredText.

They are Google style in Markdown's spelling: `code` in single backticks, |y| and ref_ as they are, and formulas, tables
and shapes as indented blocks that keep their columns. Three habits are the house's own: several parameters that share
a description (`beta, loss_type: ...`), two short ones on a line (`weight: (V, H). bias: (V,).`), and parameters
described without a heading, after a colon or in a column. Whatever is described and is no parameter is a problem, which
the build reports as a warning and so fails on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Collection
from typing import Any

SECTIONS = {
    "Args": "Parameters",
    "Attributes": "Attributes",
    "Raises": "Raises",
    "Returns": "Returns",
    "Yields": "Yields",
}
_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):$")
_ITEM = re.compile(r"(?P<names>\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}[A-Za-z_]\w*)*)(?:: | {2,})(?P<text>\S.*)")
_COLUMNS = re.compile(r"\S.* {3,}\S")
_BULLET = re.compile(r"(?:[-*]|\d+\.) +(?=\S)")
_LABEL = re.compile(r"(Attributes|Source|Work): ")
_MARKUP = re.compile(
    r"(``[^`]+``|`[^`]+`|\*\*[^*\s][^*]*\*\*|(?<![\w*])\*[^*\s](?:[^*]*[^*\s])?\*(?![\w*])|https?://[^\s)]+[^\s).,;]"
    r"|arXiv \d{4}\.\d{4,5})"
)
# What reStructuredText would read as a list, a field, a directive or an option at the start of a paragraph.
_MISREAD = re.compile(r"\(?\w{1,4}[.)] |[-+•‣⁃:>=~#.]|--?\w|/\w")

Link = Callable[[str], str | None]


class Docstring:
    """One docstring. `names`: what may be described as a parameter; `link`: the full name of a documented object.

    After `rst()`, `problems` holds a sentence for each thing that cannot be right.
    """

    def __init__(self, lines: list[str], names: Collection[str] = (), link: Link = lambda name: None) -> None:
        self.lines, self.names, self.link = _joined(lines, names), names, link
        self.problems: list[str] = []

    def rst(self) -> list[str]:
        return self._blocks(self.lines)

    def _blocks(self, lines: list[str], of_item: bool = False) -> list[str]:
        """Paragraphs, lists, indented blocks and sections. `of_item`: they describe a parameter."""
        out: list[str] = []
        at = 0
        while at < len(lines):
            line = lines[at]
            if not line.strip():
                at += 1
            elif line.startswith(" ") or (of_item and self._is_code(lines, at)):
                indented = line.startswith(" ")
                end = _end_of_indented(lines, at) if indented else _end_of_paragraph(lines, at)
                out += _literal(lines[at:end])
                at = end
            elif (section := _SECTION.match(line)) and at + 1 < len(lines) and lines[at + 1].startswith(" "):
                end = _end_of_indented(lines, at + 1)
                out += self._section(section[1], _dedent(lines[at + 1 : end]))
                at = end
            elif not of_item and self._describes(line):
                end = self._end_of_items(lines, at)
                out += self._section("Args", lines[at:end], headed=False)
                at = end
            elif _BULLET.match(line):
                end = _end_of_bullet(lines, at)
                mark = _BULLET.match(line)[0]
                body = self._blocks([line[len(mark) :], *_dedent(lines[at + 1 : end])])
                out += [f"- {body[0]}" if mark[0] in "-*" else f"#. {body[0]}", *indent(body[1:], len("- "))]
                at = end
            elif _COLUMNS.match(line):
                end = _end_of_paragraph(lines, at)
                out += _literal(lines[at:end])
                at = end
            else:
                end = self._end_of_text(lines, at)
                out += [self.inline(" ".join(part.strip() for part in lines[at:end])), ""]
                at = end
        return out

    @staticmethod
    def _is_code(lines: list[str], at: int) -> bool:
        """Whether a paragraph follows a colon and an empty line: nothing else marks the code that is all of an item."""
        before = [line for line in lines[:at] if line.strip()]
        return bool(before) and before[-1].endswith(":") and at > 0 and not lines[at - 1].strip()

    def _end_of_text(self, lines: list[str], at: int) -> int:
        """A paragraph ends where something else begins; indented lines go on with it, unless a colon announces them."""
        end = at + 1
        while end < len(lines) and lines[end].strip():
            line = lines[end]
            if line.startswith(" "):
                if lines[end - 1].endswith(":"):
                    break
            elif any(pattern.match(line) for pattern in (_SECTION, _BULLET, _COLUMNS)) or self._describes(line):
                break
            end += 1
        return end

    def _describes(self, line: str) -> bool:
        item = _ITEM.match(line)
        return item is not None and all(name in self.names for name in _split(item["names"]))

    def _end_of_items(self, lines: list[str], at: int) -> int:
        """The lines of unindented items: up to an unindented line that is none and does not end a sentence of one."""
        end = at + 1
        while end < len(lines):
            before, line = lines[end - 1], lines[end]
            unfinished = before.strip() and not before.startswith(" ") and before[-1] not in ".:;"
            if line.strip() and not line.startswith(" ") and not self._describes(line) and not unfinished:
                break
            end += 1
        return end

    def _section(self, kind: str, lines: list[str], headed: bool = True) -> list[str]:
        body: list[str] = []
        if kind in ("Returns", "Yields"):
            body = self._blocks(lines)
        else:
            for names, item in self._items(kind, lines, headed):
                terms = ", ".join(f"``{name}``" for name in names)
                text = self._blocks(item, of_item=True)
                body += [terms, *indent(text, 3)] if names else text
        return [f":{SECTIONS[kind]}:", *indent(body, 3), ""]

    def _items(self, kind: str, lines: list[str], headed: bool) -> list[tuple[list[str], list[str]]]:
        """(names, description) of each, no names for a sentence; those on one line are told apart where one ends."""
        items: list[tuple[list[str], list[str]]] = []
        for line in lines:
            found = None if line.startswith(" ") else _ITEM.match(line)
            if found:
                items.append((_split(found["names"]), [found["text"]]))
            elif items and (not headed or not line.strip() or line.startswith(" ")):
                items[-1][1].append(line)
            elif line.strip():
                items.append(([], [line]))  # a sentence about the others
        if kind != "Args":
            return [(names, [text[0], *_dedent(text[1:])]) for names, text in items]
        parts = [part for names, text in items for part in self._apart(names, [text[0], *_dedent(text[1:])])]
        for names, _ in parts:
            self.problems += [f"describes {name!r}, which is no parameter" for name in names if name not in self.names]
        return parts

    def _apart(self, names: list[str], text: list[str]) -> list[tuple[list[str], list[str]]]:
        for number, line in enumerate(text):
            for place in re.finditer(r"(?<=[.;]) (?=[A-Za-z_])", line):
                item = _ITEM.match(line, place.end())
                if item and all(name in self.names and name not in names for name in _split(item["names"])):
                    rest = self._apart(_split(item["names"]), [item["text"], *text[number + 1 :]])
                    before = line[: place.start()].removesuffix(";")
                    return [(names, [*text[:number], before if before.endswith(".") else f"{before}."]), *rest]
        return [(names, text)]

    def inline(self, text: str) -> str:
        """One paragraph: code, emphasis, links; everything else stands for itself."""
        label = _LABEL.match(text)
        parts = _MARKUP.split(text[label.end() :] if label else text)
        out = f"**{label[1]}:** " if label else ""
        for number, part in enumerate(parts):
            if number % 2 == 0:
                out += re.sub(r"([\\*`|])|(_)(?!\w)", lambda found: "\\" + found[0], part)
                continue
            before, after = out[-1:], parts[number + 1][:1]
            out += ("\\ " if before.strip() else "") + self._marked(part) + ("\\ " if after.strip() else "")
        return "\\" + out if not label and _MISREAD.match(text) and out[0] not in "\\`*" else out

    def _marked(self, part: str) -> str:
        if part.startswith("`"):
            code = part.strip("`")
            target = None if code in self.names else self.link(code)
            return f":py:obj:`{code} <{target}>`" if target else f"``{code}``"
        if part.startswith("arXiv"):
            return f"`{part} <https://arxiv.org/abs/{part.split()[1]}>`__"
        return part


def parameter_names(obj: Any) -> set[str]:
    """What a docstring of this object may describe: its parameters, and a class's annotated attributes."""
    names: set[str] = set()
    with contextlib.suppress(TypeError, ValueError):  # a module, a built-in
        names |= {*inspect.signature(obj).parameters}
    if isinstance(obj, type):
        for base in obj.__mro__:
            names |= {name for name in inspect.get_annotations(base) if not name.startswith("_")}
        if dataclasses.is_dataclass(obj):
            names |= {field.name for field in dataclasses.fields(obj)}
    return names | {f"*{name}" for name in names} | {f"**{name}" for name in names}


def indent(lines: list[str], by: int) -> list[str]:
    return [" " * by + line if line.strip() else "" for line in lines]


def _joined(lines: list[str], names: Collection[str]) -> list[str]:
    """Names that share a description may fill more than a line: they are put on one."""
    out: list[str] = []
    for line in lines:
        before = out[-1].strip().removesuffix(",") if out and out[-1].endswith(",") else ""
        if before and all(name in names for name in _split(before)):
            out[-1] += f" {line.strip()}"
        else:
            out.append(line)
    return out


def _split(names: str) -> list[str]:
    return names.split(", ")


def _dedent(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).split("\n") if lines else []


def _literal(lines: list[str]) -> list[str]:
    return ["::", "", *indent(_dedent(lines), 3), ""]


def _end_of_indented(lines: list[str], at: int) -> int:
    end = at
    for number in range(at, len(lines)):
        if lines[number].strip() and not lines[number].startswith(" "):
            break
        if lines[number].strip():
            end = number + 1
    return end


def _end_of_paragraph(lines: list[str], at: int) -> int:
    return next((number for number in range(at, len(lines)) if not lines[number].strip()), len(lines))


def _end_of_bullet(lines: list[str], at: int) -> int:
    end = at + 1
    while end < len(lines) and lines[end].startswith("  "):
        end += 1
    return end


def setup(app: Any) -> dict[str, Any]:
    from names import full_name
    from sphinx.util import logging

    logger = logging.getLogger(__name__)

    def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        names = parameter_names(obj)
        docstring = Docstring(list(lines), names, lambda code: full_name(code, besides=name))
        lines[:] = docstring.rst()
        for problem in docstring.problems:
            logger.warning("docstring of %s: %s", name, problem)

    def skip(app: Any, what: str, name: str, obj: Any, would_skip: bool, options: Any) -> bool | None:
        """A named tuple's fields have a docstring that says nothing: "Alias for field number 0"."""
        return True if (inspect.getdoc(obj) or "").startswith("Alias for field number") else None

    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}
