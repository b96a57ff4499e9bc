"""fastalign out of a checkout that was not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CODE = "import fastalign, fastalign.kernels, sys; print(fastalign.__file__); print(*fastalign.kernels.__path__)"


def printed(*command: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return [str(Path(line).resolve()) for line in done.stdout.split()]


def test_a_folder_of_links_holds_what_an_installation_would(repository, tmp_path):
    for _ in range(2):  # the second finds it as it is
        (folder,) = printed(str(repository / "benchmarks/source_tree.py"), str(tmp_path / "tree"))
    found = printed("-c", CODE, PYTHONPATH=folder)
    assert found == [str(repository / "fastalign/__init__.py"), str(repository / "kernels")]
    assert (Path(folder) / "fastalign/__init__.py").is_symlink()


def test_scripts_of_a_checkout_never_mix_it_with_an_installed_one(repository, tmp_path):
    for name in ("fastalign", "kernels"):
        (tmp_path / name).mkdir()
        shutil.copy(repository / name / "__init__.py", tmp_path / name)
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(repository / "benchmarks/source_tree.py", tmp_path / "benchmarks")
    found = printed("-c", f"import source_tree; {CODE}", PYTHONPATH=str(tmp_path / "benchmarks"))
    assert found == [str(tmp_path / "fastalign/__init__.py"), str(tmp_path / "kernels")]
