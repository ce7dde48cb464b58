"""Recordings as tokens: WAV, FLAC and OGG, one channel, one rate, 8-bit mu-law.

A token is a sample, 0 to 255 (`longstride.data.companding`), ``sample_rate_hz`` of them a second; 128 is silence. A
file is one record. Channels are averaged, and other rates resampled (`longstride.data.resampling`). A file is read in
blocks, so that memory holds its tokens, not its samples.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from longstride.data.companding import LEVELS, compress, expand
from longstride.data.kind import CorruptFileError, Kind
from longstride.data.resampling import check_rate, resample
from longstride.errors import DataError

if TYPE_CHECKING:
    import soundfile

SUFFIXES = frozenset({".wav", ".flac", ".ogg"})
FORMATS = frozenset({"WAV", "WAVEX", "RF64", "FLAC", "OGG"})

BLOCK_FRAMES = 1 << 18

# A page of Ogg has at most 65,307 bytes.
OGG_TAIL_BYTES = 1 << 16

CLIPPED = "samples were louder than full scale, and were clipped"


@dataclass(frozen=True)
class Audio(Kind):
    """Recordings at one sampling rate.

    Args:
        sample_rate_hz: samples, and tokens, a second.
    """

    sample_rate_hz: int

    name: ClassVar[str] = "audio"
    unit: ClassVar[str] = "sample"
    sample_suffix: ClassVar[str] = ".wav"

    def __post_init__(self) -> None:
        check_rate(self.sample_rate_hz)

    @classmethod
    def from_settings(cls, context: int, settings: Mapping[str, Any]) -> Self:  # noqa: ARG003 (any context will do)
        """At ``settings["sample_rate_hz"]``."""
        return cls(settings["sample_rate_hz"])

    @classmethod
    def surely(cls, file: PurePath) -> bool:
        """WAV, FLAC and OGG."""
        return file.suffix.lower() in SUFFIXES

    @property
    def vocab_size(self) -> int:
        return LEVELS

    def takes(self, file: PurePath) -> bool:
        """The same files as `surely`."""
        return self.surely(file)

    def decode(self, path: Path, changes: Counter[str]) -> Iterator[np.ndarray]:
        """uint8[samples], the whole file.

        Raises:
            CorruptFileError: damaged, cut short, of another format, or without a sample.
            DataError: the package soundfile is missing.
        """
        soundfile = _soundfile()
        _check_whole(path)
        tokens = []
        try:
            with soundfile.SoundFile(path) as file:
                if file.format not in FORMATS:
                    raise CorruptFileError(path, f"it is {file.format_info}, not WAV, FLAC or OGG")
                promised = file.frames
                for samples in resample(_mono(file), file.samplerate, self.sample_rate_hz):
                    # The filter itself overshoots a little where a recording is at full scale.
                    if loud := int((np.abs(samples) > 1.01).sum()):
                        changes[CLIPPED] += loud
                    tokens.append(compress(samples))
                read = file.tell()
        except soundfile.SoundFileError as error:
            raise CorruptFileError(path, f"not sound audio ({str(error).rpartition(': ')[2].rstrip('.')})") from error
        except DataError as error:
            raise error if isinstance(error, CorruptFileError) else CorruptFileError(path, str(error)) from error
        if read < promised:
            raise CorruptFileError(path, f"it ends after {read:,} of {promised:,} samples")
        if not sum(len(block) for block in tokens):
            raise CorruptFileError(path, "it holds no samples")
        yield np.concatenate(tokens)

    def write(self, tokens: np.ndarray, path: Path) -> None:
        """Write a 16-bit WAV of one channel."""
        samples = expand(self.check_tokens(tokens))
        _soundfile().write(path, samples, self.sample_rate_hz, subtype="PCM_16", format="WAV")


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise DataError(
            f"--kind audio needs the package soundfile ({error}): pip install 'longstride[audio]'"
        ) from error
    return soundfile


def _mono(file: "soundfile.SoundFile") -> Iterator[np.ndarray]:
    """float64[frames] a block: the mean over the channels."""
    while len(block := file.read(BLOCK_FRAMES, dtype="float64", always_2d=True)):
        yield block.mean(axis=1)


def _check_whole(path: Path) -> None:
    """libsndfile plays what is left of a WAV or OGG that was cut short, without a word."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(max(file_bytes - OGG_TAIL_BYTES, 0))
        tail = file.read()
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        (riff_bytes,) = struct.unpack("<I", head[4:8])
        # A size of all ones, or none, is what programs write that cannot go back to the header.
        if riff_bytes not in (0, 0xFFFFFFFF) and riff_bytes + 8 > file_bytes:
            raise CorruptFileError(path, f"it ends after {file_bytes:,} of {riff_bytes + 8:,} bytes")
    if head[:4] == b"OggS":
        page = tail[tail.rfind(b"OggS") :]
        # RFC 3533: bit 2 of byte 5 says that a page is the last one; bytes 27 on are the sizes of its segments, as many
        # as byte 26 says, and the segments follow them.
        sizes = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not sizes or not page[5] & 4 or len(page) < 27 + page[26] + sum(sizes):
            raise CorruptFileError(path, "it ends before its last page does")
