"""MNIST's files (http://yann.lecun.com/exdb/mnist/), which Fashion-MNIST, KMNIST and others use.

Four files, each perhaps compressed: images and labels, for training ("train") and test ("t10k").
"""

import gzip
import hashlib
import math
import os
import struct
import zlib

import numpy as np

from flaxcls.data.files import asked_splits, known_split
from flaxcls.data.source import Example, Source, fingerprint, resolve_split, take_slices
from flaxcls.data.storage import data_error, exists, is_remote, read_bytes
from flaxcls.errors import ConfigError, DataError

_PREFIXES = {"train": "train", "test": "t10k"}
_UINT8 = 8  # the code of the type, in a file's third byte; the fourth is the number of dimensions

# SHA-256 of the labels in Fashion-MNIST's two files: its names are not in them
# (Xiao et al. 2017, https://github.com/zalandoresearch/fashion-mnist).
_FASHION_LABELS = (
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
)
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class Idx(Source):
    """Grey images of one size, kept in memory; see `flaxcls.data.open_idx`.

    Raises:
      ConfigError: not a folder with the files of a split that is asked for, or an unknown split.
      DataError: a file is cut short or another kind of file.
    """

    def __init__(self, split: str, path: str):
        folder = os.path.expanduser(path)
        if not is_remote(folder) and not os.path.isdir(folder):
            raise ConfigError(f"config.data.path must be a folder of IDX files, got {folder}")
        asked = asked_splits(split, _PREFIXES)
        parts = {part: _read_split(folder, _PREFIXES[part]) for part in asked}
        slices = resolve_split(
            known_split(split, _PREFIXES),
            {part: [len(labels)] for part, (_, labels) in parts.items()},
        )
        self._images = take_slices({part: images for part, (images, _) in parts.items()}, slices)
        self._labels = take_slices({part: labels for part, (_, labels) in parts.items()}, slices)
        digests = {hashlib.sha256(labels.tobytes()).hexdigest() for _, labels in parts.values()}
        content = hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()
        super().__init__(
            name="idx",
            split=split,
            class_names=_FASHION if digests <= {*_FASHION_LABELS} else [*"0123456789"],
            image_shape=self._images.shape[1:],
            fingerprint=fingerprint(name="idx", content=content),
            splits=_PREFIXES,
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))

    def labels(self) -> np.ndarray:
        return self._labels.astype(np.int32)


def _read_split(folder: str, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 1] and labels uint8 [N]."""
    images = _read(folder, f"{prefix}-images", dimensions=3)
    labels = _read(folder, f"{prefix}-labels", dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{folder} has {len(images)} {prefix} images but {len(labels)} labels")
    return images[..., None], labels


def _read(folder: str, stem: str, dimensions: int) -> np.ndarray:
    """The array in a file, uint8."""
    names = [f"{stem}{dot}idx{dimensions}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    path = folder
    try:
        path = next(filter(exists, (os.path.join(folder, name) for name in names)), None)
        if path is None:
            raise ConfigError(f"{folder} has no {names[0]}, compressed (.gz) or not")
        content = read_bytes(path)
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except OSError as error:
        raise data_error(f"{path} cannot be read", error) from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    header = struct.Struct(f">4B{dimensions}I")
    if len(content) < header.size or content[:4] != bytes((0, 0, _UINT8, dimensions)):
        raise DataError(f"{path} is not an IDX file of bytes with {dimensions} dimensions")
    shape = header.unpack_from(content)[4:]
    size = header.size + math.prod(shape)
    if len(content) != size:
        raise DataError(f"{path} is damaged: {len(content)} bytes where its header says {size}")
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)
