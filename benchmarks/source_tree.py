"""fastalign from this checkout, installed or not: `import source_tree` comes before `import fastalign`.

An installation maps the folder kernels/ to the package fastalign.kernels; a checkout on a path does not, and a checkout
beside the installation of another one would mix the two. For programs of their own, such as pytest:

    PYTHONPATH=$(python benchmarks/source_tree.py build/tree) python -P -m pytest -m gpu tests

fills a folder of links, once, and prints it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def _put_first() -> None:
    found = importlib.util.find_spec("fastalign")
    if found is None or found.origin is None or CHECKOUT not in Path(found.origin).resolve().parents:
        sys.path.insert(0, str(CHECKOUT))
        for name in [name for name in sys.modules if name == "fastalign" or name.startswith("fastalign.")]:
            raise ImportError(f"{name} was imported from elsewhere before source_tree")
    name, folder = "fastalign.kernels", CHECKOUT / "kernels"
    kernels = importlib.util.find_spec(name)
    if kernels is not None and kernels.origin and Path(kernels.origin).resolve().parent == folder:
        return
    import fastalign

    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    fastalign.kernels = module


def link(folder: Path) -> Path:
    """Make folder/fastalign, a package of links to what an installation would hold."""
    package = folder.absolute() / "fastalign"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (CHECKOUT / "fastalign").iterdir() if path.name != "__pycache__"}
    for name, path in (wanted | {"kernels": CHECKOUT / "kernels"}).items():
        place = package / name
        if not place.is_symlink():
            place.symlink_to(path)
    return package.parent


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/source_tree.py FOLDER")
    print(link(Path(sys.argv[1])))
else:
    _put_first()
