"""Training data: sources of any kind as tokens, their split, a memory-mapped copy, and seeded windows of it."""

from longstride.data.bytes import ByteSource, open_source, standard_library
from longstride.data.catalogue import KINDS, guess_kind, make_kind, restore_kind
from longstride.data.decoded import ON_CORRUPT, DecodedSource, cache_folder, decode_source
from longstride.data.folders import written_whole
from longstride.data.kind import CorruptFileError, Kind
from longstride.data.labelled import Labelled, LabelledSplits, read_labelled
from longstride.data.prepared import PreparedData, prepare
from longstride.data.segments import Segments
from longstride.data.splits import SPLITS, assign_split, split_source
from longstride.data.windows import EvenWindows, PackedWindows, RandomWindows

__all__ = [
    "KINDS",
    "ON_CORRUPT",
    "SPLITS",
    "ByteSource",
    "CorruptFileError",
    "DecodedSource",
    "EvenWindows",
    "Kind",
    "Labelled",
    "LabelledSplits",
    "PackedWindows",
    "PreparedData",
    "RandomWindows",
    "Segments",
    "assign_split",
    "cache_folder",
    "decode_source",
    "guess_kind",
    "make_kind",
    "open_source",
    "prepare",
    "read_labelled",
    "restore_kind",
    "split_source",
    "standard_library",
    "written_whole",
]
