"""Weights in files of others: safetensors, and PyTorch's .pth without running what is in it.

A .pth file is a pickle and the bytes of the tensors: a zip archive, or, before PyTorch 1.6, one
after the other. A pickle is a program, so no general unpickler sees it: only the few names that
rebuild a tensor from its bytes are known here, and the first other one refuses the file.
"""

import dataclasses
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What files of PyTorch before 1.6 begin with.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, .pth, .pt or .bin file by their names.

    A state dict that is an entry of a dict ("state_dict", "model", ...), as trainers save it, is
    found; the prefix "module." that data parallelism adds is dropped.

    Raises ConfigError for a file that is not there, is damaged, or would run something.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file  # an extra

            return dict(load_file(path))
        state = _state_dict(_read_pth(path)) or {}
        arrays = {name.removeprefix("module."): value.array() for name, value in state.items()}
    except ImportError as error:
        raise ConfigError(
            f"{printable(path)} needs safetensors: pip install 'flaxcls[weights]'"
        ) from error
    except OSError as error:
        raise ConfigError(f"{printable(path)} can't be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except _Refused as error:
        raise ConfigError(f"{printable(path)} is refused: {error}") from error
    except Exception as error:  # of a damaged file, whatever the reader makes of it
        raise ConfigError(
            f"{printable(path)} is not a readable file of weights: {error}"
        ) from error
    if not arrays:
        raise ConfigError(f"{printable(path)} holds no state dict, a table of names and tensors")
    return arrays


def _state_dict(tree: Any) -> "dict[str, _Tensor] | None":
    """The table of tensors in what a file holds, the largest one if there are several."""
    if not isinstance(tree, Mapping):
        return None
    tensors = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, _Tensor)}
    inner = (_state_dict(value) for value in tree.values())
    return max((tensors, *filter(None, inner)), key=len)


class _Refused(Exception):
    """What a file asks for and weights don't need."""


@dataclasses.dataclass
class _Storage:
    """The elements of one or several tensors; the old format has them after the pickle."""

    dtype: Any
    count: int
    elements: np.ndarray | None = None


class _Tensor(NamedTuple):
    """A part of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """A copy; _Refused unless its last element is in the storage."""
        elements = self.storage.elements
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if self.offset < 0 or min(self.stride, default=0) < 0 or last >= max(len(elements), 1):
            raise _Refused("a tensor reaches beyond its bytes")
        elements = elements[self.offset :]
        strides = tuple(s * elements.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(elements, self.size, strides).copy()


def _read_pth(path: Path) -> Any:
    """What a file holds, with a _Tensor for each tensor."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(path):
            return _read_archive(file)
        file.seek(0)
        return _read_pickles(file)


def _read_archive(file: BinaryIO) -> Any:
    """As PyTorch saves since 1.6: a zip archive of a pickle and a file a storage."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise _Refused("a big-endian machine saved it")
        unpickler = _Unpickler(io.BytesIO(archive.read(pickled)))
        tree = unpickler.load()
        for key, storage in unpickler.storages.items():
            content = archive.read(f"{root}data/{key}")
            storage.elements = np.frombuffer(content, storage.dtype, storage.count)
    return tree


def _read_pickles(file: BinaryIO) -> Any:
    """As PyTorch saved before 1.6: pickles one after the other, then the storages."""
    try:
        magic, version, system = (_Unpickler(file).load() for _ in range(3))
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, KeyError):
        magic = None
    if magic != _MAGIC or version != _VERSION:
        raise ValueError("it does not begin as torch.save's do")
    if not system["little_endian"]:
        raise _Refused("a big-endian machine saved it")
    unpickler = _Unpickler(file)
    tree = unpickler.load()
    for key in _Unpickler(file).load():
        storage = unpickler.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        content = file.read(storage.count * np.dtype(storage.dtype).itemsize)
        if count != storage.count:
            raise _Refused(f"it has {count} elements of a storage of {storage.count}")
        storage.elements = np.frombuffer(content, storage.dtype, storage.count)
    return tree


def _rebuild_tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


class _Unpickler(pickle.Unpickler):
    """Knows tensors, and nothing that could run.

    Attributes:
      storages: those that the tensors refer to, by key; their elements are elsewhere.
    """

    _KNOWN = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    }

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        raise _Refused(f"it asks for {module}.{name}, and weights are tensors only")

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, count, *view = identity
        if kind != "storage" or not isinstance(key, str) or dtype not in _DTYPES.values():
            raise _Refused(f"it refers to {identity!r:.60}")
        if any(part is not None for part in view):
            raise _Refused("it has views of storages, as PyTorch before 0.4 saved them")
        return self.storages.setdefault(key, _Storage(dtype, count))
