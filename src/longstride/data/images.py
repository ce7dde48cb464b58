"""Images as tokens: PNG and JPEG files, CIFAR-10 in both its official versions, ImageNet-64's npz.

An image of side s is 3 * s * s tokens, each a byte: row by row, in a row pixel by pixel, in a pixel red, green, blue.
So token t stands at the model's position axes (s, s, 3): row ``t // (3 * s)``, column ``t // 3 % s``, channel ``t % 3``
(Child et al. 2019, section 5.3). The side follows from the context, which is exactly one image: 3,072 for 32 x 32,
12,288 for 64 x 64.

Files are made into 8-bit RGB: 16 bits keep their upper eight, palettes are looked up, grey is repeated, and what is
transparent lies on white. A JPEG is turned upright as its camera says. An image of another size is cropped to its
centred square and scaled by area (as Chrabaszcz et al. 2017 made ImageNet-64); the count is shown.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageOps

from longstride.data.cifar import is_cifar, read_cifar
from longstride.data.imagenet64 import is_imagenet64, read_imagenet64
from longstride.data.kind import CorruptFileError, Kind
from longstride.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})

# 8,192 x 8,192. What claims more would fill the memory, and was hardly meant for a model of a few thousand tokens.
MOST_PIXELS = 1 << 26

SCALED = "images were of another size, and were cropped to their centred square and scaled"


@dataclass(frozen=True)
class Images(Kind):
    """Square images of one size.

    Args:
        side: rows, and columns, in pixels.
    """

    side: int

    name: ClassVar[str] = "images"
    unit: ClassVar[str] = "dim"
    sample_suffix: ClassVar[str] = ".png"

    def __post_init__(self) -> None:
        if self.side < 1:
            raise DataError(f"images of side {self.side}: it must be at least 1")

    @classmethod
    def from_settings(cls, context: int, settings: Mapping[str, Any]) -> Self:  # noqa: ARG003 (nothing but the side)
        """The side whose images have ``context`` tokens.

        Raises:
            DataError: no square image has so many.
        """
        side = math.isqrt(context // 3)
        if 3 * side * side != context:
            raise DataError(
                f"--context {context:,} with --kind images: a window is one image, and one of side s has 3*s*s tokens; "
                "give --context 3072 (32 x 32), 12288 (64 x 64) or another such number"
            )
        return cls(side)

    @classmethod
    def surely(cls, file: PurePath) -> bool:
        """PNG, JPEG, or a data set's own file names."""
        return file.suffix.lower() in SUFFIXES or is_cifar(file) or is_imagenet64(file)

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def record(self) -> int:
        return 3 * self.side * self.side

    def axes(self, context: int) -> list[int]:
        """(rows, columns, channels)."""
        assert context == self.record
        return [self.side, self.side, 3]

    def takes(self, file: PurePath) -> bool:
        """The same files as `surely`."""
        return self.surely(file)

    def named_split(self, file: PurePath) -> str | None:
        """CIFAR-10's and ImageNet-64's own splits, beside those that folders name."""
        if is_cifar(file):
            return "test" if file.name.startswith("test") else "train"
        if is_imagenet64(file):
            return "validation" if file.name.startswith("val") else "train"
        return super().named_split(file)

    def decode(self, path: Path, changes: Counter[str]) -> Iterator[np.ndarray]:
        """uint8[3 * side * side] for each image in the file.

        Raises:
            CorruptFileError: damaged, of another format, too large, or a data set's file of another side.
        """
        if is_cifar(path):
            planes = read_cifar(path)
        elif is_imagenet64(path):
            planes = read_imagenet64(path)
        else:
            yield image_to_tokens(self._square(_read_image(path), changes))
            return
        for batch in planes:
            if batch.shape[1:] != (3, self.side, self.side):
                side = batch.shape[-1]
                raise CorruptFileError(
                    path, f"its images are {side} x {side}, not {self.side} x {self.side}: use --context {3 * side**2}"
                )
            # [images, channel, row, column] to [images, row, column, channel].
            yield from np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).reshape(len(batch), -1)

    def write(self, tokens: np.ndarray, path: Path) -> None:
        """Write one image as a PNG.

        Raises:
            DataError: not the tokens of one image.
        """
        Image.fromarray(tokens_to_image(self.check_tokens(tokens), self.side)).save(path, format="PNG")

    def _square(self, image: Image.Image, changes: Counter[str]) -> np.ndarray:
        if image.size != (self.side, self.side):
            changes[SCALED] += 1
            # BOX averages over the area when it makes an image smaller, and repeats pixels when it makes one larger.
            image = ImageOps.fit(image, (self.side, self.side), method=Image.Resampling.BOX)
        return np.asarray(image)


def image_to_tokens(image: np.ndarray) -> np.ndarray:
    """uint8[rows, columns, 3] to uint8[3 * rows * columns]: rows, then columns, then red, green, blue.

    Raises:
        DataError: another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"an image of shape {list(image.shape)}, {image.dtype}: give uint8[rows, columns, 3]")
    return image.reshape(-1)


def tokens_to_image(tokens: np.ndarray, side: int) -> np.ndarray:
    """int[3 * side * side] to uint8[side, side, 3]; the inverse of `image_to_tokens` for square images.

    Raises:
        DataError: another number of tokens.
    """
    if len(tokens) != 3 * side * side:
        raise DataError(f"{len(tokens):,} tokens: an image of side {side} has {3 * side * side:,}")
    return tokens.astype(np.uint8).reshape(side, side, 3)


def _read_image(path: Path) -> Image.Image:
    """The image as 8-bit RGB."""
    try:
        with warnings.catch_warnings():
            # Pillow warns, or raises, from its own limit on, which is above ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG", "JPEG"]) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise CorruptFileError(path, _too_large(f"{image.width:,} x {image.height:,} pixels"))
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except CorruptFileError:
        raise
    except Image.DecompressionBombError:
        raise CorruptFileError(path, _too_large("too many pixels")) from None
    except FileNotFoundError:
        raise
    except Exception as error:
        # A malformed file leads Pillow's readers into errors of every type.
        raise CorruptFileError(path, f"not a sound PNG or JPEG ({str(error).replace(str(path), 'it')})") from error


def _too_large(claim: str) -> str:
    return f"it claims {claim}, more than {MOST_PIXELS:,} in all"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion would clip at 255.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
