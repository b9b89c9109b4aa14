"""Which segments of a pack continue which other one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SharedPrefixes:
    """The S segments of a pack. A position sees its own segment up to itself, and all of the segment it continues.

    bounds: S + 1 offsets, from 0 to the length of the pack. prefix_of: for each segment the index of the earlier
    segment that it continues, or −1. Raises ValueError when the two do not fit, or a prefix has a prefix itself.
    """

    bounds: tuple[int, ...]
    prefix_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.bounds) != len(self.prefix_of) + 1 or self.bounds[0] != 0:
            raise ValueError(f"{len(self.prefix_of)} segments need one more bound, from 0 on: got {self.bounds}")
        if any(start > end for start, end in itertools.pairwise(self.bounds)):
            raise ValueError(f"the bounds of segments must not fall: got {self.bounds}")
        for segment, prefix in enumerate(self.prefix_of):
            if not -1 <= prefix < segment or (prefix >= 0 and self.prefix_of[prefix] >= 0):
                raise ValueError(
                    f"segment {segment} continues segment {prefix}: name an earlier segment without a prefix, or -1"
                )

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in itertools.pairwise(self.bounds)]

    @property
    def prefix_lengths(self) -> list[int]:
        """For each segment, the number of positions it continues."""
        lengths = self.lengths
        return [lengths[prefix] if prefix >= 0 else 0 for prefix in self.prefix_of]

    def position_ids(self) -> torch.Tensor:
        """int64 [T]: a segment counts on from the end of its prefix."""
        starts = zip(self.prefix_lengths, self.lengths, strict=True)
        return torch.cat([torch.arange(start, start + length) for start, length in starts])

    def segment_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T] each: the segment of a position, and the segment it continues or −1."""
        lengths = torch.tensor(self.lengths)
        segments = torch.arange(len(self.prefix_of)).repeat_interleave(lengths)
        return segments, torch.tensor(self.prefix_of).repeat_interleave(lengths)
