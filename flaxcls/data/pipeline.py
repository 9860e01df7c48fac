"""How the pictures of a split become batches: which examples, what size, resident or streamed."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from flaxcls.data.decode import Picture
from flaxcls.data.loader import BrokenImages, Decoded, Loader, materialize
from flaxcls.data.order import Order, evenly_spaced
from flaxcls.data.resident import Resident
from flaxcls.data.source import Source, reading_threads
from flaxcls.data.statistics import channel_statistics
from flaxcls.data.stream import Stream, Workers, default_workers
from flaxcls.data.transform import Transform
from flaxcls.errors import DataError
from flaxcls.runtime import output
from flaxcls.runtime.read_ahead import in_order

Input = Resident | Stream
Rows = Callable[[int], np.ndarray]  # from a batch's size to those of its rows that one reads

SAMPLE = 1000  # images that statistics are taken from, where not all are decoded
RESIDENT_BYTES = 2**30  # a split that is larger, decoded, is streamed unless the config says else


class Sizes(NamedTuple):
    """The side of the training images, in pixels: `sizes[i]` from step `begins[i]` on.

    A side of None is that of the data.
    """

    begins: tuple[int, ...]
    sizes: tuple[int | None, ...]

    def __call__(self, step: int) -> int | None:
        return self.sizes[np.searchsorted(self.begins, step, side="right") - 1]

    def describe(self) -> str:
        """The end of a sentence about the input."""
        if self.sizes == (None,):
            return ""
        later = zip(self.sizes[1:], self.begins[1:], strict=True)
        changes = "".join(f", {size} from step {begin:,} on" for size, begin in later)
        compiled = " (the step is compiled for each)" if changes else ""
        return f"; images of {self.sizes[0]} pixels per side{changes}{compiled}"


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """config.input, where each field is explained."""

    mode: Literal["auto", "resident", "stream"] = "auto"
    threads: int | None = None
    processes: int | None = None
    read_ahead: int = 4
    max_broken: float = 0.001
    max_pixels: int = 100_000_000
    max_bytes: int = 2**28
    policies: Literal["auto", "host", "device"] = "auto"

    def workers(self, source: Source) -> Workers:
        """Who decodes: as given, else by the cores of this machine and where the data are."""
        default = default_workers(self.read_ahead, source.is_remote)
        processes = default.processes if self.processes is None else self.processes
        return default._replace(threads=self.threads or default.threads, processes=processes)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What becomes of the pictures of a split; no example is read before `open` or `sample`.

    Attributes:
      source: the split.
      transform: how a picture of any size becomes an image; None where they are taken as they are.
      sizes: of the images, by the step.
      options: of reading and decoding.
      order: which examples come when; None for a split that is only evaluated.
    """

    source: Source
    transform: Transform | None
    sizes: Sizes
    options: InputOptions
    order: Order | None = None

    @property
    def is_changing(self) -> bool:
        """Whether an image is not the same every time."""
        return len(self.sizes.sizes) > 1 or bool(self.transform and self.transform.draws)

    @property
    def is_resident(self) -> bool:
        """Whether the split is decoded once and kept on the devices."""
        if self.is_changing or self.options.mode != "auto":
            return self.options.mode == "resident" and not self.is_changing
        return len(self.source) * int(np.prod(self.image_shape())) <= RESIDENT_BYTES

    def image_shape(self, step: int = 0) -> tuple[int, int, int]:
        """Height, width and channels of the images of a step."""
        size = self.sizes(step)
        return (size, size, self.source.image_shape[2]) if size else self.source.image_shape

    def open(self, report: Callable[[str], None] = print, rows: Rows | None = None) -> Input:
        """The batches, or some `rows` of each; decodes the split now if it is resident.

        `report` gets a sentence about each broken image of training, which another one replaces; in
        evaluation it is an error.
        """
        broken = progress = None
        if self.order is not None:
            broken = BrokenImages(len(self.source), self.options.max_broken, report)
            progress = _progress(self.source)
        if self.is_resident:
            images, labels = materialize(
                self.source,
                self.transform,
                self.sizes(0),
                max_pixels=self.options.max_pixels,
                broken=broken,
                progress=progress,
            )
            return Resident(images, labels, self.order, rows)
        return Stream(
            Loader(self.source, self.transform, self.options.max_pixels),
            self.order,
            image_size=self.sizes,
            workers=self.options.workers(self.source),
            rows=rows,
            broken=broken,
        )

    def unread(self) -> Input:
        """As `open` for its shapes, without reading an example: resident images are all 0."""
        if self.is_resident:
            # A view of a single 0, of whatever size.
            images = np.broadcast_to(np.uint8(0), (len(self.source), *self.image_shape()))
            return Resident(images, np.zeros(len(self.source), np.int32), self.order)
        loader = Loader(self.source, self.transform, self.options.max_pixels)
        workers = self.options.workers(self.source)
        return Stream(loader, self.order, image_size=self.sizes, workers=workers)

    def sample(self, count: int) -> np.ndarray:
        """Some images, uint8 [N, H, W, C], evenly spaced over the split; N is at most `count`."""
        unheard = BrokenImages(len(self.source), 1.0, lambda sentence: None)
        return self.images(np.array(evenly_spaced(len(self.source), count)), unheard)

    def images(self, examples: np.ndarray, broken: BrokenImages | None = None) -> np.ndarray:
        """Some examples, by their indices, as the network is shown them: uint8 [N, H, W, C]."""
        images, _ = materialize(
            self.source,
            self.transform,
            self.sizes(0),
            indices=examples,
            max_pixels=self.options.max_pixels,
            broken=broken,
        )
        return images


def statistics(data: Input, as_evaluated: Pipeline) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of training images, in units of [0, 1].

    A streamed split is not decoded only for that: SAMPLE of its images, as evaluation would see
    them, stand for it.
    """
    images = data.arrays.get("image")
    if images is None:
        images = as_evaluated.sample(SAMPLE)
    mean, std = channel_statistics(images)
    return list(map(float, mean)), list(map(float, std))


def first_images(data: Input, as_evaluated: Pipeline, count: int) -> np.ndarray:
    """At most `count` training images, uint8 [N, H, W, C], without any random crop."""
    if "image" in data.arrays:
        return data.arrays["image"][:count]
    return as_evaluated.sample(min(count, len(as_evaluated.source)))


def _progress(source: Source) -> Callable[[int, int], None] | None:
    """A line about decoding that overwrites itself, on a terminal."""
    if not output.Guarded(error=True).isatty():
        return None

    def progress(done: int, count: int) -> None:
        end = "\r" if done < count else "\r\033[K"
        output.say(f"decoding {source.name}: {done:,} of {count:,}", end=end, error=True)

    return progress


class DatasetSummary(NamedTuple):
    """What one sees of a split at a glance."""

    images: int
    classes: int
    short_side: int  # the median of the pictures' shorter sides, in pixels
    grey: bool  # whether their files say that all of those tried are


def summarize(source: Source, count: int = 300) -> DatasetSummary:
    """Reads the headers of some pictures; for the recipes that adapt to their data."""
    loader, sides, grey = Loader(source), [], True
    threads = reading_threads(source.is_remote)

    def read(index: int) -> Picture | Decoded | None:
        try:
            return loader.picture(source[index].image, index)
        except DataError:  # reported when it is read
            return None

    for picture in in_order(read, evenly_spaced(len(source), count), threads):
        if picture is not None:
            sides.append(min(picture.height, picture.width))
            grey &= picture.is_grey
    if not sides:
        raise DataError(f"none of the images of {source.name} that were tried can be read")
    return DatasetSummary(len(source), len(source.class_names), int(np.median(sides)), grey)
