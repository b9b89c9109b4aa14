from os import PathLike
from typing import Any

def create_import_structure_from_path(module_path: str | PathLike[str]) -> dict[Any, Any]: ...
