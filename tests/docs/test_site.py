"""The site builds without a warning or the network, writes nowhere else, and shows everything that is public."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sphinx", reason="the docs' tools are not here: pip install '.[docs]'")
pytest.importorskip("furo", reason="the docs' tools are not here: pip install '.[docs]'")

ROOT = Path(__file__).parents[2]
PACKAGES = ("losses", "ops", "models", "data", "reference", "rollouts", "integrations")

NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise OSError("the build of the docs needs no network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def own_files() -> set[Path]:
    """The folders that a careless build would write to."""
    return {
        path
        for folder in ("docs", "fastalign")
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in str(path)
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    before = own_files()
    command = [
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-n",
        "-E",
        "-d",
        str(folder / "doctrees"),
        "docs",
        str(folder / "html"),
    ]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    built = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stderr == ""
    assert own_files() == before
    return folder / "html"


@cache
def soup(page: Path) -> Any:
    from bs4 import BeautifulSoup

    return BeautifulSoup(page.read_text(), "html.parser")


def public_names() -> dict[str, Any]:
    """Full name -> object, of everything that an `__all__` lists."""
    found = {}
    for package in ("", *PACKAGES):
        module = importlib.import_module(f"fastalign.{package}".rstrip("."))
        for name in module.__all__:
            if not name.startswith("__") and not inspect.ismodule(getattr(module, name)):
                found[f"{module.__name__}.{name}"] = getattr(module, name)
    return found


def entries(site: Path) -> dict[str, Any]:
    """Full name -> what the reference says of it."""
    found = {}
    for page in (site / "reference").glob("*.html"):
        for term in soup(page).select("dt.sig[id^='fastalign.']"):
            found[term["id"]] = term.parent
    return found


def test_every_public_name_stands_in_the_reference(site):
    assert public_names().keys() <= entries(site).keys()


def test_other_projects_can_link_to_every_public_name(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.load((site / "objects.inv").open("rb"), "", "/".join)
    listed = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    assert public_names().keys() <= listed


def test_no_word_of_a_docstring_is_lost(site):
    """What was taken for a section, a tag or a link would be missing."""
    shown = entries(site)
    compared = 0
    for full, value in public_names().items():
        text = shown[full].get_text(" ")
        described_elsewhere = re.search(r"(See|Another name of)\s+\w+[\w.]*\s*\.\s*$", text)
        if described_elsewhere or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        words = {*re.findall(r"\w+", inspect.getdoc(value) or "")} - {"Args"}
        missing = words - {*re.findall(r"\w+", text)}
        assert not missing, f"{full}: {sorted(missing)}"
        compared += 1
    assert compared > 60


def test_no_markup_is_left_in_the_text(site):
    for page in [*(site / "reference").glob("*.html")]:
        for paragraph in soup(page).select("article p"):
            plain = "".join(
                part for part in paragraph.find_all(string=True) if part.find_parent(["code", "em"]) is None
            )
            assert not re.search(r"`|\*\*|::$|:py:|\\", plain), f"{page.name}: {plain}"


def test_every_setting_has_its_row(site):
    import fastalign
    from fastalign.trainers.config import TrainerConfig

    shown: dict[str, list[str]] = {}
    for row in soup(site / "reference/trainers.html").select("table.settings tr"):
        if cells := [cell.get_text(strip=True) for cell in row.find_all("td")]:
            shown.setdefault(cells[0], []).append(cells[3])
    configs = [getattr(fastalign, name) for name in fastalign.__all__ if name.endswith("Config")]
    for config in [*configs, TrainerConfig]:
        for field in dataclasses.fields(config):
            if field.name in inspect.get_annotations(config) and not field.name.startswith("_"):
                start = field.metadata["help"].partition("`")[0]
                assert any(text.startswith(start) for text in shown[field.name]), f"{config.__name__}.{field.name}"


def test_every_command_is_described(site):
    from fastalign.cli import COMMANDS

    text = soup(site / "reference/cli.html").find("article").get_text()
    for command in COMMANDS:
        assert f"usage: fastalign {command}" in text


def test_every_example_is_shown(site):
    text = soup(site / "examples.html").find("article").get_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert path.read_text().rstrip().splitlines()[-1] in text, path.name


def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for tag in soup(page).find_all(["script", "link", "img", "iframe"]):
            address = tag.get("src") or tag.get("href") or ""
            assert not address.startswith(("http:", "https:", "//")), f"{page.name}: {address}"


@pytest.mark.parametrize(
    "page", ["index", "loop", "training", "measuring", "architecture", "results", "LOG", "changelog", "contributing"]
)
def test_pages_are_there(site, page):
    article = soup(site / f"{page}.html").find("article")
    assert article.find("h1")
    assert len(article.get_text()) > 500
