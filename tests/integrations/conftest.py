"""The tiny models of tests/models, for patches on them."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("models_conftest", Path(__file__).parents[1] / "models" / "conftest.py")
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
zoo = _MODULE.zoo
