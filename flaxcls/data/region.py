"""Decoding only a part of a JPEG, where nvImageCodec is installed (`pip install 'flaxcls[fast]'`).

It decodes on the CPU, bit by bit the same as OpenCV, and skips what is beside the part:
random crops of ImageNet came 1.25 times as fast (2 cores, jax 0.10.2).
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from flaxcls.runtime.output import Guarded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that native code says on standard error is seen."""
    Guarded(error=True).flush()
    before = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@functools.cache
def load_codec() -> ModuleType | None:
    """nvImageCodec, None where it is not installed; not to be called first in several threads."""
    try:
        with _quiet():  # it misses its plugins for GPUs, which are not needed here
            from nvidia import nvimgcodec
    except ImportError:
        return None
    return nvimgcodec


_END_OF_IMAGE = b"\xff\xd9"
_thread = threading.local()


def decode_region(image: bytes, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """The box (top, left, height, width) of a colour JPEG, uint8 RGB [height, width, 3].

    None where it can't be done here. The file must have an end: of one cut short, the part before
    the cut could be decoded, but whether an image is broken must not depend on where it is cropped.
    """
    nvimgcodec = load_codec()
    if nvimgcodec is None or _END_OF_IMAGE not in image[-16:]:
        return None
    if not hasattr(_thread, "decoder"):
        cpu = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
        _thread.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[cpu]
        )
        _thread.params = nvimgcodec.DecodeParams(apply_exif_orientation=False)
    top, left, height, width = box
    try:
        whole = nvimgcodec.CodeStream(image)
        part = whole.get_sub_code_stream(
            region=nvimgcodec.Region(top, left, top + height, left + width)
        )
        decoded = _thread.decoder.decode(part, params=_thread.params)
    except RuntimeError:
        return None
    return None if decoded is None else np.asarray(decoded.cpu())
