"""What a process of the fork server runs: a script, as `python SCRIPT ARGUMENTS` would. The server has its imports.

Set beforehand: argv, environment, errors_path (stderr goes there; stdout nowhere).
"""

import os
import runpy
import sys

import torch

os.environ.clear()
os.environ.update(environment)  # noqa: F821
os.dup2(os.open(errors_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # noqa: F821
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
torch.set_num_threads(1)
sys.argv = argv  # noqa: F821
runpy.run_path(argv[0], run_name="__main__")  # noqa: F821
