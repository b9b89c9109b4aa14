"""What all sections of a configuration have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        if isinstance(value, Path) and (len(str(value)) > 1000 or any(len(os.fsencode(p)) > 255 for p in value.parts)):
            raise ValueError("must be a path that file systems take: 255 bytes a name")
        return value
