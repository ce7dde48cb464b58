"""Training data as bytes: sources, their split, a memory-mapped copy, and seeded windows of it."""

from longstride.data.bytes import SPLITS, ByteSource, assign_split, open_source, split_source, standard_library
from longstride.data.folders import written_whole
from longstride.data.prepared import PreparedData, prepare
from longstride.data.windows import EvenWindows, RandomWindows

__all__ = [
    "SPLITS",
    "ByteSource",
    "EvenWindows",
    "PreparedData",
    "RandomWindows",
    "assign_split",
    "open_source",
    "prepare",
    "split_source",
    "standard_library",
    "written_whole",
]
