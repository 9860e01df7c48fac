"""Another data set by the classes of a network: matched by their names, or as a CSV says."""

import csv
import os
from collections.abc import Mapping, Sequence

import numpy as np

from flaxcls.data.decode import MAX_PIXELS, Picture, stretch
from flaxcls.data.files import class_name
from flaxcls.data.source import Example, Source, fingerprint, some_names
from flaxcls.data.storage import open_text
from flaxcls.errors import ConfigError, did_you_mean
from flaxcls.runtime.output import printable

LEFT_OUT = -1


class Matched(Source):
    """The examples of a source whose classes a network knows, labelled by the network's classes.

    Args:
      source: another data set's split.
      class_names: those of the network.
      class_of: the network's class by the source's, "" for one whose examples are left out; of the
        others the names must be the same. See `read_class_map`.
      image_shape: what pictures are stretched to, where the network is given no other transform;
        None: they are what they are.
      max_pixels: as in `Loader`, of pictures that are stretched.

    Raises ConfigError, which names the classes that match none.
    """

    def __init__(
        self,
        source: Source,
        class_names: Sequence[str],
        class_of: Mapping[str, str] | None = None,
        *,
        image_shape: tuple[int, int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self._source, self._max_pixels = source, max_pixels
        self.is_remote = source.is_remote
        self._label_of = match_classes(source, class_names, class_of or {})
        self._stretched = image_shape if source.image_shape != image_shape else None
        self._indices = np.arange(len(source))
        if (self._label_of == LEFT_OUT).any():
            self._indices = np.flatnonzero(self._label_of[source.labels()] != LEFT_OUT)
            if not len(self._indices):
                raise ConfigError(f"every class of {source.name} '{source.split}' is left out")
        super().__init__(
            name=source.name,
            split=source.split,
            class_names=class_names,
            image_shape=image_shape or source.image_shape,
            fingerprint=fingerprint(source=source.fingerprint, classes=self._label_of.tolist()),
            splits=source.splits,
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        image, label = self._source[int(self._indices[index])]
        if self._stretched:
            height, width, channels = self._stretched
            if isinstance(image, bytes):
                picture = Picture(
                    image, channels, where=self.where(index), max_pixels=self._max_pixels
                )
                image = picture.pixels()
            image = stretch(image, height, width)
        known = 0 <= label < len(self._label_of)
        return Example(image, int(self._label_of[label]) if known else label)

    def labels(self) -> np.ndarray:
        return self._label_of[self._source.labels()[self._indices]]

    def where(self, index: int) -> str:
        return self._source.where(int(self._indices[index]))

    def file(self, index: int) -> str | None:
        return self._source.file(int(self._indices[index]))


def match_classes(
    source: Source, class_names: Sequence[str], class_of: Mapping[str, str]
) -> np.ndarray:
    """The label of the network, or LEFT_OUT, by the source's label, int32."""
    label_of = {class_name(name): label for label, name in enumerate(class_names)}
    theirs = [class_name(name) for name in source.class_names]
    for name, known in class_of.items():
        if name not in theirs:
            raise ConfigError(
                f"the classes' file names '{name}', which {source.name} does not have"
                f"{did_you_mean(name, theirs)}"
            )
        if known and known not in label_of:
            raise ConfigError(
                f"the classes' file has '{known}' for '{name}', which the network does not know"
                f"{did_you_mean(known, label_of)}"
            )
    unknown = [name for name in theirs if class_of.get(name, name) not in (*label_of, "")]
    if unknown:
        raise ConfigError(
            f"the network does not know {len(unknown):,} of the {len(theirs):,} classes of "
            f"{source.name}: {some_names(unknown)}; it knows {some_names(list(label_of))}. "
            "--classes=FILE.csv, with a row name,class for each, says which are meant"
        )
    found = (class_of.get(name, name) for name in theirs)
    return np.array([label_of.get(name, LEFT_OUT) for name in found], np.int32)


def read_class_map(path: str) -> dict[str, str]:
    """The rows of a CSV file: a data set's class and what a network calls it, "" to leave it out.

    A first row "name,class" is a header. Raises ConfigError, with the line, for what is not so.
    """
    where, found = printable(path), {}
    try:
        with open_text(os.path.expanduser(path)) as file:
            reader = csv.reader(file, strict=True)
            for number, cells in enumerate(cells for cells in reader if any(cells)):
                if len(cells) != 2 or not cells[0].strip():
                    raise ConfigError(
                        f"{where}, line {reader.line_num}: must be name,class, got "
                        f"{printable(','.join(cells))}"
                    )
                name, known = (class_name(cell.strip()) for cell in cells)
                if number == 0 and (name.lower(), known.lower()) == ("name", "class"):
                    continue
                if found.setdefault(name, known) != known:
                    raise ConfigError(f"{where}, line {reader.line_num}: '{name}' is there twice")
    except OSError as error:
        raise ConfigError(f"--classes={where} can't be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--classes={where} is not CSV in UTF-8: {error}") from error
    if not found:
        raise ConfigError(f"--classes={where} has no rows; each should be name,class")
    return found
