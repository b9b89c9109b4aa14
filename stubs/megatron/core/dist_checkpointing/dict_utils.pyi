from collections.abc import Iterator
from typing import Any

def nested_values(x: dict[Any, Any] | list[Any]) -> Iterator[Any]: ...
