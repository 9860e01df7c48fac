"""Writes a data set again with smaller pictures, which training reads and decodes much faster.

    python -m flaxcls.data prepare --source=NAME-or-PATH --out=DIR [--short_side=256] [--quality=90]

makes a TFDS data set of ArrayRecord files, DIR/NAME/1.0.0, of the whole splits that
config.data.train_split and config.data.eval_split name. A picture whose shorter side is longer
than --short_side pixels becomes a JPEG with that side; the others keep their bytes, or are encoded
again if they are rotated or anything but 8-bit grey or RGB in JPEG or PNG. Pictures that can't be
read are skipped in the training split, up to a share of config.input.max_broken; if there are
more, or any to evaluate on, no data set is made and the exit code is 45.

The data set is written atomically. The same command resumes where it was interrupted, with what is
in DIR/.NAME.incomplete; remove that to start from scratch. --out=gs://BUCKET/FOLDER or s3://... is
written to, shard by shard, by way of a temporary folder on this machine.
"""

import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from flaxcls import cli
from flaxcls.config.recipes import load_recipe
from flaxcls.data import SOURCES, writer
from flaxcls.data.commands.shared import define_flags, read_config
from flaxcls.data.decode import MAX_PIXELS, Picture
from flaxcls.data.loader import check_label
from flaxcls.data.order import evenly_spaced
from flaxcls.data.source import Source, fingerprint, reading_threads
from flaxcls.data.writer import Tally
from flaxcls.errors import ConfigError, DataError
from flaxcls.remote import is_remote
from flaxcls.runtime.output import printable, say

SHARD_BYTES = 200_000_000  # about
_SAMPLE = 64  # pictures that the size of all is estimated from
_NAMED = 20  # unreadable pictures in an error
_JPEG_SIDE = 65500  # pixels at most, as libjpeg has it

FLAGS = define_flags()
flags.DEFINE_string("out", None, "A folder for prepared data sets.", flag_values=FLAGS)
flags.DEFINE_string(
    "name", None, "Name of the new data set; the source's and the side.", flag_values=FLAGS
)
flags.DEFINE_integer("short_side", 256, "Pixels at most.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "quality", 90, "Quality of the JPEGs.", lower_bound=1, upper_bound=100, flag_values=FLAGS
)


Maker = Callable[[range], tuple[list[bytes], Tally]]


class Recipe(NamedTuple):
    """What becomes of a picture."""

    short_side: int = 256  # pixels at most
    quality: int = 90  # of JPEG, 1 to 100
    max_pixels: int = MAX_PIXELS  # a picture with more counts as unreadable


def main(argv: Sequence[str]) -> int:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.out is None:
        raise ConfigError("--out=DIR is missing: the folder for prepared data sets")
    config = read_config(FLAGS, overrides)
    name = FLAGS.name or _default_name(config, FLAGS.short_side)
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in SOURCES:
        raise ConfigError(
            f"--name must be letters, digits and underscores such as pictures_256, and none of "
            f"{', '.join(SOURCES)}, got {name!r}"
        )
    out = _folder(FLAGS.out)
    train, evaluation = _whole_splits(config)
    began = time.perf_counter()
    totals = prepare(
        train,
        evaluation,
        out / name,
        Recipe(FLAGS.short_side, FLAGS.quality, config.input.max_pixels),
        max_broken=config.input.max_broken,
        threads=FLAGS.threads or reading_threads(train.is_remote),
    )
    if totals is None:
        say(f"{printable(out / name)} is already prepared")
    else:
        _print_totals(totals)
        say(f"{printable(out / name)} was written in {time.perf_counter() - began:.1f} s")
    command = ["python", "-m", "flaxcls.main", *_flags_to_train(config, name, out)]
    say(f"To train on it:  {shlex.join(command)}")
    return 0


def _folder(path: str) -> Any:
    """The folder that --out names: a Path of this machine or epath's in the cloud."""
    if not is_remote(path):
        return Path(path).expanduser()
    from etils import epath

    try:
        return epath.Path(path)
    except KeyError as error:
        raise ConfigError(f"--out={path} has an unknown URL scheme") from error


def _default_name(config: ConfigDict, short_side: int) -> str:
    """The source's own name and the size, as TFDS allows names to be."""
    given = Path(config.data.path).stem if config.data.path else config.data.name
    name = re.sub("[^a-z0-9]+", "_", given.partition(":")[0].lower()).strip("_")
    return f"{name if name[:1].isalpha() else f'data_{name}'}_{short_side}"


def _whole_splits(config: ConfigDict) -> tuple[Source, Source]:
    """The splits that config.data.train_split and eval_split are, or are slices of."""
    from flaxcls import build  # JAX, which takes a second: not for --help

    names = []
    for field in ("train_split", "eval_split"):
        spec = config.data[field]
        names.append(spec.partition("[")[0].strip())
        if "+" in spec or names[-1] == "all":
            raise ConfigError(
                f"config.data.{field} must be a split or a slice of one to prepare, got '{spec}'"
            )
    if names[0] == names[1]:
        raise ConfigError(
            f"config.data.train_split and config.data.eval_split are both of '{names[0]}', but "
            "prepare writes two whole splits, one to train on and one to evaluate on"
        )
    train, evaluation = (build.source(config, name) for name in names)
    return train, evaluation


def _print_totals(totals: Mapping[str, Tally]) -> None:
    for split, tally in totals.items():
        say(
            f"{split}: {tally.written:,} pictures, {tally.kept:,} of them as they were; "
            f"{tally.bytes_before / 1e6:,.1f} MB became {tally.bytes / 1e6:,.1f} MB"
        )
        for sentence in tally.left_out:
            say(f"  skipped: {sentence}")


def _flags_to_train(config: ConfigDict, name: str, out: Any) -> list[str]:
    given = [f"--config={FLAGS.config or 'FILE'}"]
    given += [f"--config.data.name={name}", f"--config.data.dir={out}"]
    for field in ("train_split", "eval_split"):
        given.append(f"--config.data.{field}={config.data[field]}")
    if FLAGS.config:  # what the recipe says of its own source is not for TFDS
        kept = ("name", "dir", "train_split", "eval_split", "mean", "std")
        recipe = load_recipe(FLAGS.config, []).config.data
        unused = (key for key, value in recipe.items() if value is not None and key not in kept)
        given += [f"--config.data.{key}=None" for key in unused]
    return given


def prepare(
    train: Source,
    evaluation: Source,
    target: Any,
    recipe: Recipe,
    *,
    max_broken: float,
    threads: int,
) -> dict[str, Tally] | None:
    """Writes two splits, under their own names, as the data set `target`.

    Args:
      train, evaluation: the sources, whole splits.
      target: the new folder, DIR/NAME: a Path, or epath's in the cloud.
      recipe: what becomes of the pictures.
      max_broken: share of the training pictures that may be skipped because they can't be read.
      threads: that decode and encode.

    Returns:
      What was done by split, over all attempts; None if `target` is there and the same already.

    Raises:
      ConfigError: `target` is something else or can't be written, or TFDS can't hold the names of
        the classes.
      DataError: too many pictures can't be read, or a label is no class.
    """
    sources = {source.split: source for source in (train, evaluation)}
    names, shape = train.class_names, train.image_shape
    _check_class_names(names)
    metadata = {
        "source": train.name,
        "splits": {split: source.fingerprint for split, source in sources.items()},
        "classes": fingerprint(names=names),
        "image_shape": list(shape),
        **recipe._asdict(),
    }
    is_complete, new_writer = writer.is_complete, writer.DatasetWriter
    if is_remote(target):
        from flaxcls.data import bucket_writer  # and TFDS, which takes a second

        is_complete, new_writer = bucket_writer.is_complete, bucket_writer.BucketWriter
    if is_complete(target, metadata):
        return None
    if None not in shape:
        shape = (*shrunk(*shape[:2], recipe.short_side), shape[2])
    makers = {split: _maker(source, recipe) for split, source in sources.items()}
    shards = {split: _shards(len(source), makers[split]) for split, source in sources.items()}
    metadata["shards"] = {split: len(parts) for split, parts in shards.items()}
    try:
        with new_writer(target, metadata) as new:
            tallies = {
                split: new.write_split(split, shards[split], makers[split], threads)
                for split in sources
            }
            totals = {split: sum(parts, Tally()) for split, parts in tallies.items()}
            _refuse_broken(totals[train.split], train.split, max_broken)
            _refuse_broken(totals[evaluation.split], evaluation.split, 0.0)
            new.finish(
                tallies,
                class_names=names,
                image_shape=shape,
                description=f"{train.name}, the shorter side of its pictures at most "
                f"{recipe.short_side} pixels, by flaxcls.data prepare",
            )
    except OSError as error:
        raise ConfigError(
            f"{target} can't be written: {error.strerror}; when it can, the same command resumes"
        ) from error
    return totals


def _check_class_names(names: Sequence[str]) -> None:
    """TFDS keeps them in a text file, one name per line."""
    for name in names:
        if name.encode(errors="ignore").decode().splitlines() != [name.strip()]:
            raise ConfigError(f"the class {name!r} can't be written: TFDS has names of one line")


def _refuse_broken(tally: Tally, split: str, max_broken: float) -> None:
    broken = tally.left_out
    if len(broken) <= max_broken * (tally.written + len(broken)):
        return
    limit = "none may be skipped in an evaluation"
    if max_broken:
        limit = f"config.input.max_broken = {max_broken:g} allows fewer to be skipped"
    named = "; ".join(broken[:_NAMED])
    more = f"; and {len(broken) - _NAMED:,} more" if len(broken) > _NAMED else ""
    what = f"{len(broken):,} pictures of '{split}' can't be read, and {limit}"
    raise DataError(f"{what}: {named}{more}")


def _shards(count: int, make: Maker) -> list[range]:
    """The examples of each shard: equally many, in order, about SHARD_BYTES."""
    sample = evenly_spaced(count, _SAMPLE)
    total = sum((make(range(index, index + 1))[1] for index in sample), Tally())
    shards = max(1, round(count / len(sample) * total.bytes / SHARD_BYTES))
    bounds = [count * number // shards for number in range(shards + 1)]
    return [range(*bound) for bound in zip(bounds[:-1], bounds[1:], strict=True)]


def _maker(source: Source, recipe: Recipe) -> Maker:
    """What makes the records of some of a source's examples, and says what became of them."""
    from tensorflow_datasets.proto import tf_example_pb2

    channels = source.image_shape[2]

    def make(examples: range) -> tuple[list[bytes], Tally]:
        records, tally = [], Tally()
        for index in examples:
            where = source.where(index)
            try:
                image, label = source[index]
                stored = smaller(image, channels, recipe, where=where)
            except DataError as error:
                tally.left_out.append(str(error))
                continue
            check_label(source, index, label)
            record = tf_example_pb2.Example()
            record.features.feature["image"].bytes_list.value.append(stored)
            record.features.feature["label"].int64_list.value.append(label)
            records.append(record.SerializeToString(deterministic=True))
            tally.written += 1
            tally.kept += stored is image
            tally.bytes_before += len(image) if isinstance(image, bytes) else image.nbytes
            tally.bytes += len(stored)
        return records, tally

    return make


def shrunk(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the shorter one at most `short_side`, in the same proportion."""
    scale = min(1.0, short_side / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def smaller(
    image: bytes | np.ndarray, channels: int, recipe: Recipe, *, where: str = "an image"
) -> bytes:
    """A picture as it is stored: see the beginning of this file.

    Args:
      image: an encoded picture, or pixels uint8 [H, W, C].
      channels: 3, or 1 for grey.
      recipe: size and quality.
      where: how errors name the picture.

    Raises:
      DataError: it can't be read, or is too long for a JPEG.
    """
    if isinstance(image, np.ndarray):
        (height, width), is_plain, is_lossy = image.shape[:2], False, False
        decode = _no_decoding(image)
    else:
        picture = Picture(image, channels, where=where, max_pixels=recipe.max_pixels)
        decode, header = picture.pixels, picture.header
        height, width = header.height, header.width
        is_plain = header.format in ("JPEG", "PNG") and header.mode in ("L", "RGB")
        is_plain = is_plain and header.orientation == 1
        is_lossy = header.format in ("JPEG", "MPO", "WEBP")
    shape = shrunk(height, width, recipe.short_side)
    if max(shape) > _JPEG_SIDE:
        raise DataError(f"{where} is {width} x {height} pixels: too long for a JPEG")
    if shape == (height, width):
        pixels = decode(1)  # also of what is kept: it has to be readable
        return image if is_plain else _encode(pixels, ".jpg" if is_lossy else ".png", recipe)
    zoom = min(height, width) / recipe.short_side
    reduction = next((r for r in (8, 4, 2) if zoom >= 3 * r), 1)  # leaves three times the side
    pixels = decode(reduction)
    if pixels.shape[:2] == (height, width):
        reduction = 1  # not every format can be reduced
    file = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    box = (0, 0, width / reduction, height / reduction)
    resized = file.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)  # antialiased
    return _encode(np.asarray(resized), ".jpg", recipe)


def _no_decoding(pixels: np.ndarray) -> Callable[[int], np.ndarray]:
    return lambda reduction: pixels


def _encode(pixels: np.ndarray, suffix: str, recipe: Recipe) -> bytes:
    if pixels.shape[2:] == (3,):
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    options = [cv2.IMWRITE_JPEG_QUALITY, recipe.quality] if suffix == ".jpg" else []
    return cv2.imencode(suffix, pixels, options)[1].tobytes()
