"""Weights in files of others: safetensors, and PyTorch's .pth without running what is in it.

A .pth file is a zip archive of a pickle and the bytes of the tensors. A pickle is a program, so no
general unpickler sees it: only the few names that rebuild a tensor from its bytes are known here,
and the first other one refuses the file.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
        tree = _read_pth(path)
    except ImportError as error:
        raise ConfigError(
            f"{printable(path)} needs safetensors: pip install 'flaxcls[weights]'"
        ) from error
    except OSError as error:
        raise ConfigError(f"{printable(path)} can't be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except Exception as error:  # of a damaged file, whatever the reader makes of it
        raise ConfigError(
            f"{printable(path)} is not a readable file of weights: {error}"
        ) from error
    state = _state_dict(tree)
    if not state:
        raise ConfigError(f"{printable(path)} holds no state dict, a table of names and tensors")
    return {name.removeprefix("module."): array for name, array in state.items()}


def _state_dict(tree: Any) -> dict[str, np.ndarray] | None:
    """The table of arrays in what a file holds, the largest one if there are several."""
    if not isinstance(tree, Mapping):
        return None
    arrays = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    inner = (_state_dict(value) for value in tree.values())
    return max((arrays, *filter(None, inner)), key=len)


class _Refused(Exception):
    """What a file asks for and weights don't need."""


def _read_pth(path: Path) -> Any:
    path.open("rb").close()  # OSError if it can't be
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"{printable(path)} is no file that PyTorch 1.6 or newer has saved: load it there and "
            "save its state_dict() anew, best as safetensors"
        )
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ConfigError(f"{printable(path)} was saved by a big-endian machine")
        try:
            return _Unpickler(archive, root).load()
        except _Refused as error:
            raise ConfigError(f"{printable(path)} is refused: {error}") from error


class _Storage(NamedTuple):
    """The elements of one or several tensors."""

    elements: np.ndarray


def _rebuild_tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    """A copy of the tensor; its last element must be in the storage."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min(stride, default=0) < 0 or last >= max(len(storage.elements), 1):
        raise _Refused("a tensor reaches beyond its bytes")
    elements = storage.elements[offset:]
    strides = tuple(s * elements.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(elements, size, strides).copy()


def _rebuild_parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


class _Unpickler(pickle.Unpickler):
    """Knows tensors, and nothing that could run."""

    _KNOWN = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    }

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        raise _Refused(f"it asks for {module}.{name}, and weights are tensors only")

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(key, str) or dtype not in _DTYPES.values():
            raise _Refused(f"it refers to {identity!r:.60}")
        content = self._archive.read(f"{self._root}data/{key}")
        return _Storage(np.frombuffer(content, dtype, count))
