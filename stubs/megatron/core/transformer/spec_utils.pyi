from dataclasses import dataclass
from typing import Any

@dataclass(kw_only=True)
class ModuleSpec:
    module: Any
    """A class, or where to import it from."""
    submodules: Any = None
    """Of a type for each kind of module."""
