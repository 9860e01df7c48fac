"""Draws what the network sees of a batch, with labels.

    python -m flaxcls.data preview --config=FILE --out=grid.png [--count=8] [--config.seed=1 ...]

The file shows the first examples of a training batch, one below the other three times:

  evaluation  as evaluation would see them
  training    what the host makes of them, crops perhaps: the training batch as it is loaded
  augmented   what the network is trained on, with what is left of its label after mixup and cutmix

It is the very batch that training gets at --step, counted from 0. All of it is loaded and
augmented, because examples are mixed with each other; a smaller --config.batch_size is quicker, but
another batch. Small images are enlarged, a pixel as a square.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime import output

FLAGS = cli.common_flags("config")
flags.DEFINE_string("out", None, "The picture's file, such as grid.png.", flag_values=FLAGS)
flags.DEFINE_integer("count", 8, "How many examples.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("step", 0, "Which batch.", lower_bound=0, flag_values=FLAGS)

_TILE = 192  # pixels per side that smaller images are enlarged to, at most
_COLUMNS = 8  # examples beside each other; more go below
_MARGIN, _CAPTION, _TITLE = 6, 20, 84  # pixels: between tiles, below a tile, left of a row


class Row(NamedTuple):
    """Images below a title, uint8 [N, H, W, C], and a caption for each: words with their shares."""

    title: str
    images: np.ndarray
    captions: list[list[tuple[str, float]]]


def main(argv: Sequence[str]) -> None:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.config is None:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits_cnn.py")
    if FLAGS.out is None:
        raise ConfigError("--out=FILE is missing, such as --out=grid.png")
    out = Path(FLAGS.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"--out={out} must end in .png, .jpg or .webp")
    cli.check_folder("out", out)
    config = cli.load_config(FLAGS.config, overrides)
    rows = preview(config, step=FLAGS.step, count=FLAGS.count)
    picture = io.BytesIO()
    draw(rows).save(picture, Image.registered_extensions()[out.suffix.lower()])
    try:
        out.write_bytes(picture.getvalue())
    except OSError as error:
        raise ConfigError(f"--out={out} can't be written: {error.strerror}") from error
    shown = len(rows[0].captions)
    where, of = output.printable(out), f"the {config.batch_size} examples of batch {FLAGS.step}"
    output.say(f"{where}: {shown} of {of}")


def preview(config: ConfigDict, *, step: int, count: int) -> list[Row]:
    """The first examples of the training batch `step`: in evaluation, as loaded, augmented."""
    import jax  # which takes a second, as what follows: not for --help

    from flaxcls import augment, build
    from flaxcls.data.loader import Loader
    from flaxcls.data.pipeline import statistics
    from flaxcls.data.resident import gather
    from flaxcls.runtime import sharding

    build.check(config)
    experiment = build.make_experiment(config, sharding.make_mesh())
    names, evaluated = experiment.class_names, experiment.as_evaluated
    data = experiment.train.open(_say)
    with contextlib.closing(data):
        mean, std = experiment.normalization or statistics(data, evaluated)
        batch = gather(data.arrays, data.batch(step))
    augmentation = augment.build(experiment.augmentations, mean=mean, std=std)
    labels = jax.nn.one_hot(batch["label"], len(names))
    augmented = _augmented(experiment, augmentation, step, {**batch, "label": labels})

    load = Loader(evaluated.source, evaluated.transform, evaluated.options.max_pixels)
    size, indices = evaluated.sizes(0), batch["index"][:count].tolist()
    normalized = np.asarray(augmented["image"][:count])
    pixels = np.round((normalized * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return [
        Row(
            "evaluation",
            np.stack([load(index, size)[0] for index in indices]),
            [[(names[label], 1.0)] for label in batch["label"][:count].tolist()],
        ),
        Row(
            "training",
            np.asarray(batch["image"][:count]),
            [[(f"example {index:,}", 1.0)] for index in indices],
        ),
        Row("augmented", pixels, _largest(np.asarray(augmented["label"][:count]), names)),
    ]


def _augmented(experiment: Any, augmentation: Callable, step: int, batch: Any) -> Any:
    """The images and labels of a batch as `flaxcls.core.step.make_train_step` augments them."""
    import jax

    from flaxcls.core.step import augmentation_key, seed_key, step_keys

    key, _ = step_keys(seed_key(experiment.seed), step)
    parts = experiment.gradient_accumulation
    augment_part = jax.jit(
        lambda key, index, part: augmentation(augmentation_key(key, index, parts), part)
    )
    result = {name: np.zeros(batch[name].shape, np.float32) for name in ("image", "label")}
    for index in range(parts):
        part = augment_part(key, index, {name: x[index::parts] for name, x in batch.items()})
        for name, array in result.items():
            array[index::parts] = part[name]
    return result


def _say(sentence: str) -> None:
    output.say(f"flaxcls: {sentence}", error=True)


def _largest(labels: np.ndarray, names: Sequence[str]) -> list[list[tuple[str, float]]]:
    """The two classes with the largest shares of each label, float [N, K], or the only one."""
    best = np.argsort(-labels, axis=1, kind="stable")[:, :2]
    return [
        [(names[label], shares[label]) for label in two if shares[label] >= 0.005]
        for two, shares in zip(best.tolist(), labels.tolist(), strict=True)
    ]


def draw(rows: Sequence[Row]) -> Image.Image:
    """The rows below each other, with their titles and captions; what is too long is broken up."""
    font = ImageFont.load_default(14)
    sizes = ["{1} x {0}".format(*row.images.shape[1:]) for row in rows]
    rows = [row._replace(images=_enlarge(row.images)) for row in rows]
    width = max(row.images.shape[2] for row in rows)
    count = len(rows[0].captions)
    starts = range(0, count, _COLUMNS)
    height = sum(row.images.shape[1] + _CAPTION + _MARGIN for row in rows) + 3 * _MARGIN
    columns = min(count, _COLUMNS)
    size = (_TITLE + columns * (width + _MARGIN) + _MARGIN, len(starts) * height)
    picture = Image.new("RGB", size, "lightgrey")
    pen = ImageDraw.Draw(picture)
    for block, start in enumerate(starts):
        top = block * height + _MARGIN
        for row, pixels in zip(rows, sizes, strict=True):
            pen.text((_MARGIN, top), f"{row.title}\n{pixels}", "black", font)
            for column, index in enumerate(range(start, min(start + _COLUMNS, count))):
                left = _TITLE + column * (width + _MARGIN)
                picture.paste(Image.fromarray(row.images[index]), (left, top))
                text = _caption(row.captions[index], font, width)
                pen.text((left, top + row.images.shape[1] + 2), text, "black", font)
            top += row.images.shape[1] + _CAPTION + _MARGIN
    return picture


def _enlarge(images: np.ndarray) -> np.ndarray:
    """In colour, and with every pixel a square if the images are small."""
    factor = max(1, _TILE // max(images.shape[1:3]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return images if images.shape[3] == 3 else images.repeat(3, axis=3)


def _caption(words: list[tuple[str, float]], font: ImageFont.FreeTypeFont, width: int) -> str:
    """`cat 0.70 / dog 0.30`, or one word alone, shortened until it is no wider than `width`."""

    def text(length: int) -> str:
        cut = [word if len(word) <= length else word[:length] + ".." for word, _ in words]
        if len(words) == 1:
            return cut[0]
        return " / ".join(
            f"{word} {share:.2f}" for word, (_, share) in zip(cut, words, strict=True)
        )

    longest = max(len(word) for word, _ in words)
    fitting = (text(n) for n in range(longest, 1, -1) if font.getlength(text(n)) <= width)
    return next(fitting, text(1))
