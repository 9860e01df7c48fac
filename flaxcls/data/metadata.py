"""The metadata of TFDS's data sets, dataset_info.json and features.json, checked before TFDS's use.

TFDS imports the module of every feature class that features.json names: any code that can be found,
in the current folder too, would run. Only classes of TFDS itself are let through. And it trusts
these files to be intact, which after a download they may not be.
"""

import json
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from flaxcls.data.storage import read_bytes
from flaxcls.errors import DataError
from flaxcls.runtime.output import printable

INFO, FEATURES = "dataset_info.json", "features.json"
_MAX_BYTES = 2**26  # of such a file; the largest of TFDS's own have some MB
_MAX_CLASSES = 10**6
_TRUSTED = frozenset(
    f"{kind.__module__}.{kind.__name__}"
    for kind in (
        tfds.features.Audio,
        tfds.features.BBoxFeature,
        tfds.features.ClassLabel,
        tfds.features.Dataset,
        tfds.features.FeaturesDict,
        tfds.features.Image,
        tfds.features.LabeledImage,
        tfds.features.Scalar,
        tfds.features.Sequence,
        tfds.features.Tensor,
        tfds.features.Text,
        tfds.features.Translation,
        tfds.features.TranslationVariableLanguages,
        tfds.features.Video,
    )
)


def read_info(directory: epath.PathLike) -> tfds.core.DatasetInfo:
    """What TFDS says of a prepared data set; the folder may be in the cloud.

    Raises:
      DataError: a file is missing or damaged, or names a class that is not TFDS's own.
    """
    directory = epath.Path(directory)
    for name in (INFO, FEATURES):
        path = directory / name
        content = _read_object(path)
        if name == FEATURES:
            for kind in feature_classes(content):
                if kind not in _TRUSTED:
                    raise DataError(
                        f"{path} names a feature class that is not TFDS's own and would be "
                        f"imported: {printable(kind)}"
                    )
    try:
        info = tfds.builder_from_directory(directory).info
        if not isinstance(info.features, tfds.features.FeaturesDict):
            raise TypeError(f"{FEATURES} must be of a FeaturesDict")
        return info
    except Exception as error:  # whatever TFDS does with files that aren't as it writes them
        raise damaged(directory, error) from error


def damaged(directory: epath.PathLike, error: Exception) -> DataError:
    """The error for metadata that are JSON, but don't describe a data set."""
    reason = " ".join((str(error).strip() or repr(error)).splitlines()[0].split())[:200]
    return DataError(f"{directory}: {INFO} and {FEATURES} don't describe a data set: {reason}")


def _read_object(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = read_bytes(path, _MAX_BYTES)
        if len(content) > _MAX_BYTES:
            raise DataError(f"{path} is damaged: it has more than {_MAX_BYTES:,} bytes")
        found = json.loads(content)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it holds no JSON object")
    return found


def feature_classes(content: Any) -> Iterator[str]:
    """The classes that TFDS would look up for features.json, in all ways of writing it.

    JSON may be in the text of JSON: so are the features of TFDS 4.4 and older.
    """
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name"):
                if isinstance(value.get(key), str):
                    yield value[key]
            if isinstance(value.get("type"), str) and "content" in value:
                yield value["type"]
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and "{" in value:
            try:
                pending.append(json.loads(value))
            except (ValueError, RecursionError):
                continue


def class_names(info: tfds.core.DatasetInfo, directory: epath.PathLike, key: str) -> list[str]:
    """The classes of a feature, by label; DataError where their file is not what it was.

    TFDS takes numbers for names that can't be read, and says nothing.
    """
    feature, path = info.features[key], epath.Path(directory) / f"{key}.labels.txt"
    count = feature.num_classes
    if not count or not 0 < count <= _MAX_CLASSES:
        raise DataError(f"{directory}: '{key}' in {FEATURES} has {count} classes")
    try:
        written = path.exists() and path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    names = [name.strip() for name in written or () if name.strip()] or feature.names
    if len({*names}) != count or len(names) != count:
        raise DataError(f"{path} is damaged: it has {len({*names}):,} names of {count:,} classes")
    return [*map(printable, names)]
