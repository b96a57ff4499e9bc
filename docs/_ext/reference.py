"""Pages that follow the code: what a package exports, the fields of a config, what the command line says.

Pages under reference/ and those that show a file of the root are templates; the functions below fill them in before
they are parsed, so that a name added to an `__all__` or a field added to a config is documented without further ado.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import re
from pathlib import Path
from typing import Any

from docstrings import Docstring, indent
from names import PACKAGES, SHARED_CONFIG, constant_text, defined_at, described, documented, full_name, homes

ROOT = Path(__file__).parents[2]
FUSED = (
    "fastalign.ops",
    "fastalign.linear",
    "fastalign.types",
)  # what reference/linear.rst shows of the package itself
TEMPLATES = re.compile(r"index|examples|results|changelog|contributing|reference/\w+")


# ---- what stands in a page


def api(package: str, modules: tuple[str, ...] = ("",), first: tuple[str, ...] = ()) -> str:
    """The public names of a package, a section for each module that defines some, under a table of all.

    modules: only those whose full name begins so. first: the last words of the modules that come before the others.
    """
    chosen = {name: home for name, home in homes(package).items() if home.startswith(modules) and home != package}
    order = {name: place for place, name in enumerate(first)}
    ordered = sorted({*chosen.values()}, key=lambda home: (order.get(home.rpartition(".")[2], len(order)), home))
    out = [
        f".. py:currentmodule:: {package}",
        "",
        *_overview(package, sorted(chosen, key=lambda name: ordered.index(chosen[name]))),
    ]
    for home in ordered:
        names = [name for name in chosen if chosen[name] == home]
        out += _module_intro(home)
        for name in sorted(names, key=lambda name: defined_at(home, name)):
            out += _entry(package, name, home)
    return "\n".join(out)


def trainers() -> str:
    """A section for each trainer: its arguments, then the settings of its config."""
    out: list[str] = []
    names = [name for name in homes("fastalign") if name.endswith("Trainer")]
    for name in sorted(names):
        method = name.removesuffix("Trainer")
        out += _heading(name, "-")
        out += [".. py:currentmodule:: fastalign", "", *_entry("fastalign", name, homes("fastalign")[name])]
        if f"{method}Config" in homes("fastalign"):
            out += [*_entry("fastalign", f"{method}Config", ""), *config_table("fastalign", f"{method}Config")]
    return "\n".join(out)


def shared_config() -> str:
    module, _, name = SHARED_CONFIG.rpartition(".")
    return "\n".join([f".. py:currentmodule:: {module}", "", *_entry(module, name, ""), *config_table(module, name)])


def others() -> str:
    """What the package itself exports and no other page describes."""
    out = [".. py:currentmodule:: fastalign", ""]
    for name, home in homes("fastalign").items():
        package = home.split(".")[1] if "." in home else ""
        elsewhere = package in PACKAGES and name in homes(f"fastalign.{package}")
        if package and not home.startswith((*FUSED, "fastalign.trainers")) and not elsewhere:
            out += [*_module_intro(home), *_entry("fastalign", name, home)]
    return "\n".join(out)


def config_table(module: str, name: str) -> list[str]:
    """The fields that a config declares itself, with type, default and help."""
    config = getattr(importlib.import_module(module), name)
    own = inspect.get_annotations(config)
    rows = []
    for field in dataclasses.fields(config):
        if field.name not in own or field.name.startswith("_"):
            continue
        if not (text := field.metadata.get("help")):
            raise ValueError(f"{name}.{field.name} has no help")
        accepted = "".join(f" ``{choice}``" for choice in field.metadata.get("choices", ()))
        text = Docstring([], link=full_name).inline(text) + (f" Accepted:{accepted}." if accepted else "")
        rows.append([f"``{field.name}``", f"``{own[field.name]}``", f"``{_default(field)}``", text])
    return _table(["field", "type", "default", ""], rows, "settings", "20 17 13 50")


def command_help(command: str) -> str:
    """What `fastalign COMMAND --help` prints, as a block."""
    from fastalign.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([*command.split(), "--help"])
    if status:
        raise ValueError(f"fastalign {command} --help exits with {status}")
    return "\n".join([".. code-block:: text", "", *indent(printed.getvalue().rstrip().split("\n"), 3), ""])


def commands() -> str:
    from fastalign.cli import COMMANDS

    out: list[str] = []
    for command in COMMANDS:
        out += [*_heading(f"fastalign {command}", "-"), command_help(command)]
    return "\n".join(out)


def examples(*first: str) -> str:
    """The scripts of examples/, what each says of itself and its code; then the configurations."""
    scripts = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
    out: list[str] = []
    for name in [*first, *(name for name in scripts if name not in first)]:
        tree = ast.parse(scripts[name].read_text())
        text = (ast.get_docstring(tree) or "").split("\n")
        out += [*_heading(text[0].partition(":")[0].rstrip("."), "-"), *Docstring(text, link=full_name).rst()]
        begin = tree.body[1].lineno  # after the docstring
        out += [f".. literalinclude:: ../examples/{name}.py", "   :language: python", f"   :lines: {begin}-", ""]
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        out += [*_heading(path.name, "-"), f".. literalinclude:: ../examples/{path.name}", "   :language: yaml", ""]
    return "\n".join(out)


def document(path: str, without_results: bool = False) -> str:
    """A Markdown file of the root, its links turned to the pages of the site."""
    text = (ROOT / path).read_text()
    if without_results:
        text = re.sub(
            r"<!-- results: begin.*?results: end -->", "[Measured figures](results.md)", text, flags=re.DOTALL
        )
    pages = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
    pages["LICENSE"] = "https://www.apache.org/licenses/LICENSE-2.0"
    return re.sub(
        r"\]\((?!https?://|#)([^)#]+)", lambda link: "](" + pages.get(link[1], link[1].removeprefix("docs/")), text
    )


def results() -> str:
    """The README's block of measurements."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- results: begin.*?-->(.*?)<!-- results: end -->", text, re.DOTALL)[1]
    return re.sub(r"^###", "##", block, flags=re.MULTILINE).replace("](benchmarks/", "](../benchmarks/")


def unlisted() -> str:
    """The pages that the index does not name: tables that are generated."""
    index = (ROOT / "docs/index.md").read_text()
    pages = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    return "\n".join(page for page in pages if page != "index" and not re.search(rf"^{page}$", index, re.MULTILINE))


# ---- parts


def _heading(text: str, underline: str) -> list[str]:
    return [text, underline * (len(text) + 2), ""]


def _table(head: list[str] | None, rows: list[list[str]], css_class: str, widths: str) -> list[str]:
    out = [
        ".. list-table::",
        f"   :header-rows: {int(bool(head))}",
        f"   :widths: {widths}",
        f"   :class: {css_class}",
        "",
    ]
    for row in [*([head] if head else []), *rows]:
        out += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(row)]
    return [*out, ""]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def _overview(package: str, names: list[str]) -> list[str]:
    rows = []
    for name in names:
        target = documented().get(f"{package}.{name}", f"{package}.{name}")
        rows.append([f":py:obj:`{name} <{target}>`", _summary(package, name)])
    return _table(None, rows, "overview", "35 65")


def _summary(package: str, name: str) -> str:
    """The first sentence of what is said of it."""
    lines = described(package, name)
    paragraph = " ".join(line.strip() for line in "\n".join(lines).split("\n\n")[0].split("\n"))
    sentence = re.match(r".*?[^.\s]\.(?=\s+[A-Z`*]|$)|.*", paragraph)
    return Docstring([], link=lambda code: full_name(code, f"{package}.{name}")).inline(sentence[0] if sentence else "")


def _module_intro(module: str) -> list[str]:
    """A heading, and what the module says of itself."""
    title = module.rpartition(".")[2].replace("_", " ").capitalize()
    text = inspect.getdoc(importlib.import_module(module)) or ""
    return [*_heading(title, "-"), *Docstring(text.split("\n"), link=full_name).rst(), ""]


def _entry(package: str, name: str, home: str) -> list[str]:
    value = getattr(importlib.import_module(package), name)
    full = f"{package}.{name}"
    described_at = documented().get(full, full)
    is_class, is_function = inspect.isclass(value), inspect.isroutine(value)
    kind = "class" if is_class else "function" if is_function else "data"
    if is_class and value.__name__ != name:  # another name for a class
        return [f".. py:class:: {name}", "", f"   Another name of :py:obj:`{value.__name__}`.", ""]
    if described_at != full:
        entry = [f".. py:{kind}:: {name}{'(...)' if is_function else ''}", "", f"   See :py:obj:`{described_at}`.", ""]
        if home.startswith((*FUSED, "fastalign.trainers")):
            return entry
        above = [".. py:currentmodule:: fastalign", "", *_automatic(kind, name, value)]
        return [*above, f".. py:currentmodule:: {package}", "", *entry]
    if is_class or is_function:
        return _automatic(kind, name, value)
    text = Docstring(constant_text(home, name), link=lambda code: full_name(code, full)).rst()
    return [f".. py:data:: {name}", *indent(_value(value), 3), "", *indent(text, 3), ""]


def _automatic(kind: str, name: str, value: Any) -> list[str]:
    """autodoc's directive. A config's signature would be transformers' hundred fields; some bases say nothing."""
    shown = f"{name}(**settings)" if kind == "class" and dataclasses.is_dataclass(value) and _is_config(value) else name
    telling = kind == "class" and any(
        base.__module__.partition(".")[0] in ("fastalign", "transformers") for base in value.__bases__
    )
    return [f".. auto{kind}:: {shown}", *(["   :show-inheritance:"] if telling else []), ""]


def _is_config(value: type) -> bool:
    return any(base.__name__ == "TrainingArguments" for base in value.__mro__)


def _value(value: Any) -> list[str]:
    """Short values as they are; of a table its keys."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        keys = ", ".join(f"``{key!r}``" for key in value)
        return ["", f"{'Keys' if value else 'Empty'}: {keys}."]
    return [f":value: {value!r}"] if len(repr(value)) < 200 else []


# ---- Sphinx


FUNCTIONS = (api, others, trainers, shared_config, command_help, commands, examples, document, results, unlisted)


def setup(app: Any) -> dict[str, Any]:
    from jinja2 import Environment, StrictUndefined
    from sphinx.util import logging

    logger = logging.getLogger(__name__)
    templates = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    templates.globals |= {function.__name__: function for function in FUNCTIONS}

    def fill_in(app: Any, docname: str, source: list[str]) -> None:
        if TEMPLATES.fullmatch(docname):
            source[0] = templates.from_string(source[0]).render()

    def check(app: Any, env: Any) -> None:
        objects = env.domains.python_domain.objects
        for full in documented():
            if full not in objects:
                logger.warning("%s is public and stands on no page of the reference", full)
            package, _, name = full.rpartition(".")
            value = getattr(importlib.import_module(package), name)
            if (inspect.isclass(value) or inspect.isroutine(value)) and not inspect.getdoc(value):
                logger.warning("%s is public and has no docstring", full)

    app.connect("source-read", fill_in)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
