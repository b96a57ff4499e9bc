"""Every module can be imported; the package itself costs nothing until a name is used."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastalign

ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "fastalign").rglob("*.py")]
    names += [f"fastalign.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")]
    return sorted(name.removesuffix(".__init__") for name in names)


@pytest.mark.parametrize("module", modules())
def test_module_can_be_imported(module: str):
    try:
        importlib.import_module(module)
    except ImportError as error:
        launcher = module.startswith("fastalign.kernels.") or module == "fastalign.ops.cuda_backend"
        if launcher and error.name in ("triton", "fastalign.kernels"):
            pytest.skip(f"{error.name} is optional and not here")
        raise


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["fastalign", "fastalign.cli"])
def test_import_is_light(module: str):
    loaded = in_a_fresh_process(
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_public_names_resolve():
    for name in fastalign.__all__:
        assert getattr(fastalign, name) is not None
        assert name in dir(fastalign)
    with pytest.raises(AttributeError, match="no attribute 'linear_logp'"):
        _ = fastalign.linear_logp


def test_public_names_agree_with_what_type_checkers_see():
    """__all__, the table of homes and the imports under TYPE_CHECKING are three lists of one fact."""
    tree = ast.parse(Path(fastalign.__file__).read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name: module for name, module in seen.items() if module != "fastalign"} == fastalign._HOME_OF
    assert {name for name, module in seen.items() if module == "fastalign"} == set(fastalign._SUBPACKAGES)
    assert set(fastalign.__all__) == {*seen, "__version__"}


def test_the_extension_is_built_where_there_is_a_compiler():
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    assert importlib.util.find_spec("fastalign.kernels._C") is not None, (
        "run `make setup` and read what the compiler says"
    )
