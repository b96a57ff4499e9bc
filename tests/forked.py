"""What a process of the fork server runs: a script, as `python SCRIPT ARGUMENTS` would. The server has its imports.

Set beforehand: argv, environment, folder (to work in), output_path, errors_path.
"""

import os
import runpy
import sys

import torch

os.environ.clear()
os.environ.update(environment)  # noqa: F821
for descriptor, path in ((1, output_path), (2, errors_path)):  # noqa: F821
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
os.chdir(folder)  # noqa: F821
torch.set_num_threads(1)
sys.argv = argv  # noqa: F821
sys.path.insert(0, os.path.dirname(argv[0]))  # noqa: F821
runpy.run_path(argv[0], run_name="__main__")  # noqa: F821
