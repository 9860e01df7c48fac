"""Convolutions by oneDNN, for XLA's CPU programs, where a package with its library is installed.

oneDNN is what PyTorch and TensorFlow convolve with on x86 CPUs. Here its C interface is called by
ctypes, and XLA calls that as a custom call: https://uxlfoundation.github.io/oneDNN/dev_guide_c_and_cpp_apis.html
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import math
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_uint8, c_void_p
from typing import Any, Literal, NamedTuple

import jax

PACKAGE = "onednn-cpu-gomp"
_TARGET = "flaxcls_onednn_convolution"

# Values of enumerations in dnnl_types.h and dnnl_common_types.h, the same since oneDNN 3.0.
_CPU, _IN_ORDER, _FORWARD, _DIRECT, _ANY = 1, 1, 64, 1, 1
_TYPES = {"bfloat16": 2, "float32": 3}
_USER_SCRATCHPAD = 1
_WEIGHTS, _DIFF_WEIGHTS, _SCRATCHPAD = 131, 132, 136  # dnnl_query_*_md
_SRC, _DST, _SCRATCHPAD_ARGUMENT = 1, 17, 80
# What each kind of convolution reads and writes: images, kernel and maps, or their gradients.
_ARGUMENTS = {"forward": (1, 33, 17), "images": (129, 33, 145), "kernel": (1, 161, 145)}

Kind = Literal["forward", "images", "kernel"]


class Convolution(NamedTuple):
    """A convolution of images [B,H,W,C] with a kernel [h,w,C,D], or one of its gradients.

    Attributes:
      kind: "forward" of images and kernel, or the gradient by "images" of kernel and the maps'
        gradient, or that by the "kernel" of images and the maps' gradient.
      dtype: "float32" or "bfloat16", of everything.
      images, kernel: their shapes.
      strides: down and across.
      padding: (top, bottom, left, right).
      threads: how many compute it.
    """

    kind: Kind
    dtype: str
    images: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[int, ...]
    threads: int

    @property
    def maps(self) -> tuple[int, ...]:
        """The shape of the result, [B,H,W,D]."""
        batch, height, width, _ = self.images
        top, bottom, left, right = self.padding
        return (
            batch,
            (height + top + bottom - self.kernel[0]) // self.strides[0] + 1,
            (width + left + right - self.kernel[1]) // self.strides[1] + 1,
            self.kernel[3],
        )

    @property
    def result(self) -> tuple[int, ...]:
        """The shape of what this kind computes."""
        return {"forward": self.maps, "images": self.images, "kernel": self.kernel}[self.kind]

    @property
    def flops(self) -> int:
        """Products and sums, without those with the padding, as XLA counts them."""
        batch, *sizes, channels = self.images
        top, _, left, _ = self.padding
        met = 1  # pairs of a pixel of the images and one of the kernel
        for axis, before in enumerate((top, left)):
            places = range(-before, self.maps[1 + axis] * self.strides[axis] - before)
            begins = places[:: self.strides[axis]]
            met *= sum(
                min(begin + self.kernel[axis], sizes[axis]) - max(begin, 0) for begin in begins
            )
        return 2 * batch * channels * self.kernel[3] * met

    def to_text(self) -> str:
        """What `from_text` reads: it is in the compiled program, which outlives the process."""
        numbers = (*self.images, *self.kernel, *self.strides, *self.padding, self.threads)
        return " ".join([self.kind, self.dtype, *map(str, numbers)])

    @classmethod
    def from_text(cls, text: str) -> "Convolution":
        kind, dtype, *words = text.split()
        numbers = tuple(map(int, words))
        shapes = numbers[:4], numbers[4:8], numbers[8:10], numbers[10:14]
        return cls(kind, dtype, *shapes, numbers[14])


def flops(program: str) -> Iterator[int]:
    """Those of each call in the HLO text of a compiled program."""
    calls = re.finditer(rf'custom_call_target="{_TARGET}".*?backend_config="?(.*?)"', program)
    return (Convolution.from_text(call[1]).flops for call in calls)


def can(convolution: Convolution) -> bool:
    """Whether the library is there and knows this convolution."""
    try:
        known = version() is not None and convolution.dtype in _TYPES
        return known and bool(_primitive(convolution))
    except _Failed:
        return False


def call(convolution: Convolution, *arrays: jax.Array) -> jax.Array:
    """The convolution of two arrays, in a program for one CPU device, where it `can`.

    It has no gradient of its own.
    """
    _register()
    result = jax.ShapeDtypeStruct(convolution.result, convolution.dtype)
    options = {
        "custom_call_api_version": 3,  # the description below is passed as it is
        "legacy_backend_config": convolution.to_text(),
    }
    return jax.ffi.ffi_call(_TARGET, result, vmap_method="sequential", **options)(*arrays)


@functools.cache
def version() -> str | None:
    """The version of the library, such as "3.2.0"; None where there is none that works."""
    return ".".join(map(str, _library().dnnl_version().contents[:3])) if _library() else None


@functools.cache
def _library() -> Any:
    """The library, loaded; None where it isn't installed or can't be."""
    try:
        files = importlib.metadata.files(PACKAGE) or ()
        path = next(str(file.locate()) for file in files if file.name == "libdnnl.so.3")
        with _sleeping_threads():
            library = ctypes.CDLL(path)
            library.omp_set_num_threads  # noqa: B018 (of the library's own OpenMP)
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError, AttributeError):
        return None
    library.dnnl_version.restype = POINTER(c_int * 3)
    library.dnnl_primitive_desc_query_md.restype = c_void_p
    library.dnnl_primitive_desc_query_md.argtypes = [c_void_p, c_int, c_int]
    library.dnnl_memory_desc_get_size.restype = c_size_t
    library.dnnl_memory_desc_get_size.argtypes = [c_void_p]
    library.dnnl_memory_create.argtypes = [c_void_p] * 4
    library.dnnl_primitive_execute.argtypes = [c_void_p, c_void_p, c_int, c_void_p]
    return library


@contextlib.contextmanager
def _sleeping_threads() -> Iterator[None]:
    """Here OpenMP is loaded so that its threads sleep when they have nothing to do.

    By default they spin for a while, on the cores that XLA's next operator needs. The variable is
    read once, and is put back for what this process starts.
    """
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]


class _Failed(Exception):
    """oneDNN has refused something; with the name of the function."""


def _made(function: str, *arguments: Any) -> c_void_p:
    """What a function of oneDNN makes: its first argument, a pointer to it, is added here."""
    result = c_void_p()
    _checked(function, byref(result), *arguments)
    return result


def _checked(function: str, *arguments: Any) -> None:
    if status := getattr(_library(), function)(*arguments):
        raise _Failed(f"{function} of oneDNN {version()} returned {status}")


@functools.cache
def _engine() -> c_void_p:
    return _made("dnnl_engine_create", _CPU, c_size_t(0))


def _dims(numbers: Sequence[int]) -> Any:
    return (c_int64 * 12)(*numbers)


def _layout(dtype: str, shape: Sequence[int], order: str, wanted: str) -> c_void_p:
    """The description of an array whose axes are named by `order`; oneDNN calls them `wanted`."""
    sizes = dict(zip(order, shape, strict=True))
    strides = {axis: math.prod(shape[i + 1 :]) for i, axis in enumerate(order)}
    return _made(
        "dnnl_memory_desc_create_with_strides",
        len(shape),
        _dims([sizes[axis] for axis in wanted]),
        _TYPES[dtype],
        _dims([strides[axis] for axis in wanted]),
    )


def _size(layout: c_void_p | int) -> int:
    """Bytes, rounded up to a multiple of what the CPU reads at once."""
    return -(-_library().dnnl_memory_desc_get_size(layout) // 64) * 64


class _Primitive:
    """A convolution, compiled by oneDNN; several threads may call it at once."""

    def __init__(self, c: Convolution):
        dtype = c.dtype
        height, width, inputs, outputs = c.kernel
        images = _layout(dtype, c.images, "bhwc", "bchw")
        maps = _layout(dtype, c.maps, "bhwc", "bchw")
        kernel = _layout(dtype, c.kernel, "hwio", "oihw")
        chosen = 4, _dims((outputs, inputs, height, width)), _TYPES[dtype], _ANY  # by oneDNN
        any_kernel = _made("dnnl_memory_desc_create_with_tag", *chosen)
        top, bottom, left, right = c.padding
        geometry = [_dims(x) for x in (c.strides, (0, 0), (top, left), (bottom, right))]
        attributes = _made("dnnl_primitive_attr_create")
        _checked("dnnl_primitive_attr_set_scratchpad_mode", attributes, _USER_SCRATCHPAD)

        name = "dnnl_convolution_{}_primitive_desc_create"
        begin = (_engine(), _FORWARD, _DIRECT)
        bias, end = None, (*geometry, attributes)
        made = _made(name.format("forward"), *begin, images, any_kernel, bias, maps, *end)
        if c.kind != "forward":
            end = (*geometry, made, attributes)
            begin = (_engine(), _DIRECT)
        if c.kind == "images":
            made = _made(name.format("backward_data"), *begin, images, any_kernel, maps, *end)
        elif c.kind == "kernel":
            arrays = (images, any_kernel, bias, maps)
            made = _made(name.format("backward_weights"), *begin, *arrays, *end)
        self._convolution = _made("dnnl_primitive_create", made)

        # The kernel is in another order for oneDNN, so that it is copied before or after.
        query = _library().dnnl_primitive_desc_query_md
        own = query(made, _DIFF_WEIGHTS if c.kind == "kernel" else _WEIGHTS, 0)
        scratchpad = query(made, _SCRATCHPAD, 0)
        orders = (own, kernel) if c.kind == "kernel" else (kernel, own)
        source, target = (c_void_p(order) if order is own else order for order in orders)
        copy = (source, _engine(), target, _engine(), None)
        copy = _made("dnnl_reorder_primitive_desc_create", *copy)
        self._copy = _made("dnnl_primitive_create", copy)
        self._layouts = (images, kernel, maps, own, scratchpad)
        self._own_size, self._scratch_size = _size(own), _size(scratchpad)
        self._kind: Kind = c.kind
        self._threads = c.threads

    def __call__(self, result: int, first: int, second: int) -> None:
        """Computes the result of two arrays; all three are addresses."""
        addresses = {
            "forward": (first, second, result),
            "images": (result, first, second),
            "kernel": (first, result, second),
        }[self._kind]
        _library().omp_set_num_threads(self._threads)  # that this thread starts
        with _workspace(self._own_size + self._scratch_size) as (stream, space):
            spaces = (*addresses, space, space + self._own_size)
            memories = [
                _made("dnnl_memory_create", layout, _engine(), address)
                for layout, address in zip(self._layouts, spaces, strict=True)
            ]
            images, kernel, maps, own, scratchpad = memories
            named = zip(_ARGUMENTS[self._kind], (images, own, maps), strict=True)
            convolve = (self._convolution, *named, (_SCRATCHPAD_ARGUMENT, scratchpad))
            if self._kind == "kernel":
                calls = [convolve, (self._copy, (_SRC, own), (_DST, kernel))]
            else:
                calls = [(self._copy, (_SRC, kernel), (_DST, own)), convolve]
            for primitive, *arguments in calls:
                array = (_Argument * len(arguments))(*arguments)
                _checked("dnnl_primitive_execute", primitive, stream, len(arguments), array)
            _checked("dnnl_stream_wait", stream)
            for memory in memories:
                _checked("dnnl_memory_destroy", memory)


class _Argument(ctypes.Structure):
    _fields_ = (("name", c_int), ("memory", c_void_p))


_primitive = functools.cache(_Primitive)

_workspaces: list[tuple[c_void_p, Any]] = []  # a stream and memory each, of no call at the moment


@contextlib.contextmanager
def _workspace(size: int) -> Iterator[tuple[c_void_p, int]]:
    """A stream, and the address of so many bytes; kept for later calls, of any thread."""
    try:
        stream, memory = _workspaces.pop()
    except IndexError:
        stream, memory = _made("dnnl_stream_create", _engine(), _IN_ORDER), b""
    if len(memory) < size + 64:
        memory = (c_uint8 * (size + 64))()
    try:
        yield stream, -(-ctypes.addressof(memory) // 64) * 64
    finally:
        _workspaces.append((stream, memory))


@functools.cache
def _register() -> None:
    """Makes `_called` known to XLA."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]
    capsule = new(ctypes.cast(_called, c_void_p), b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu", api_version=0)


@ctypes.CFUNCTYPE(None, c_void_p, POINTER(c_void_p), c_void_p, c_size_t, c_void_p)
def _called(result, arrays, text, length, _status):
    """What XLA calls, from any of its threads. It must not raise."""
    convolution = Convolution.from_text(ctypes.string_at(text, length).decode())
    try:
        _primitive(convolution)(result, arrays[0], arrays[1])
    except Exception:  # then the step is not finite, and is skipped and reported as such
        traceback.print_exc()
        size = 2 if convolution.dtype == "bfloat16" else 4
        ctypes.memset(result, 0xFF, math.prod(convolution.result) * size)
