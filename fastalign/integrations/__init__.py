"""fastalign in other people's loops: methods of a transformers model, and other libraries' trainers.

Modules named after a library import it when they are used, never before.
"""

from fastalign.integrations.patch import PatchHandle, patch, unpatch
from fastalign.integrations.trl import patch_trl

__all__ = ["PatchHandle", "patch", "patch_trl", "unpatch"]
