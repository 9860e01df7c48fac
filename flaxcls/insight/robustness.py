"""How a saved run withstands attacks: clean and robust accuracy, and the adversarial images."""

import contextlib
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxcls import augment
from flaxcls.core.metrics import WEIGHTS
from flaxcls.core.perturbation import NORMS, Ball, distance, parse_eps
from flaxcls.core.step import seed_key
from flaxcls.data.pipeline import Pipeline
from flaxcls.errors import ConfigError, did_you_mean
from flaxcls.inference.exporter import new_folder
from flaxcls.inference.predictor import Predictor
from flaxcls.insight.attacks import METHODS, Attack, Targets, chain, make_runner
from flaxcls.models.onednn import convolutions_for
from flaxcls.runtime import sharding

COLUMNS = ("index", "class", "clean", "attack", "adversarial", "rounded", "linf", "l2", "file")


class Victim:
    """A network as attacks see it: a function of images in [0, 1], in batches of one size.

    `variables` are on the devices of `mesh`; `mean` and `std` are the run's normalisation.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        network: Any,
        variables: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
    ):
        def logits_of(variables: Any, images: jax.Array) -> jax.Array:
            images = augment.normalize(images * 255, mean, std)
            return network.apply(variables, images, train=False).astype(jnp.float32)

        self.mesh, self.variables = mesh, variables
        self.logits_of = convolutions_for(mesh, logits_of)
        self.num_classes: int = network.num_classes
        self.batch_size = sharding.round_up(mesh, batch_size)
        self._classify = jax.jit(
            lambda variables, images: self.logits_of(variables, images).argmax(axis=1)
        )

    def batches(self, *arrays: np.ndarray) -> Iterator[tuple[int, list[jax.Array]]]:
        """How many rows count in each batch, and the arrays' rows, filled up, on the devices."""
        for start in range(0, len(arrays[0]), self.batch_size):
            rows = np.arange(start, start + self.batch_size)
            rows = np.minimum(rows, len(arrays[0]) - 1)
            batch = {str(place): array[rows] for place, array in enumerate(arrays)}
            count = min(self.batch_size, len(arrays[0]) - start)
            yield count, list(sharding.split_batch(self.mesh, batch).values())

    def classify(self, images: np.ndarray) -> np.ndarray:
        """The classes, int32 [N], of float32 images [N, H, W, C] in [0, 1]."""
        found = [np.zeros(0, np.int32)]
        for count, (batch,) in self.batches(images):
            found.append(jax.device_get(self._classify(self.variables, batch))[:count])
        return np.concatenate(found)


class Attacked(NamedTuple):
    """What became of N images.

    Attributes:
      images: float32 [N, H, W, C], in the ball: adversarial, where one was found, or as they were.
      clean, predicted: the class of each without and with the attack, int32 [N].
      by: the attack that first succeeded, "" for none; one the network was wrong about has none.
      accuracies: after each attack in turn, by name; the first, "clean", is without any.
    """

    images: np.ndarray
    clean: np.ndarray
    predicted: np.ndarray
    by: list[str]
    accuracies: dict[str, float]


def attack_images(
    victim: Victim,
    images: np.ndarray,
    labels: np.ndarray,
    attacks: Sequence[Attack],
    *,
    indices: np.ndarray | None = None,
    restarts: int = 1,
    seed: int = 0,
    alive: Callable[[str], None] = lambda text: None,
) -> Attacked:
    """Attacks images, float32 [N, H, W, C] in [0, 1], by attacks in turn; labels are int32 [N].

    Only what the network is still right about is attacked further, so that accuracy never rises. It
    is judged by the images that are returned. The random numbers of an image are those of its
    number in `indices`, the attack and the restart: not of what is attacked beside it. `alive` is
    told what is done next.
    """
    indices = np.arange(len(images), dtype=np.int32) if indices is None else indices
    clean = victim.classify(images)
    found, predicted, by = images.copy(), clean.copy(), [""] * len(images)
    accuracies = {"clean": float(np.mean(clean == labels))}
    for place, attack in enumerate(attacks):
        run = make_runner(attack, victim.logits_of, sharding.platform(victim.mesh))
        ranks = min(9, victim.num_classes - 1) if attack.aims else 1
        for restart in range(restarts):
            key = jax.random.fold_in(jax.random.fold_in(seed_key(seed), place), restart)
            for rank in range(1, ranks + 1):
                alive(f"{attack.name}: {np.sum(predicted == labels):,} images are withstood")
                left = np.flatnonzero(predicted == labels)
                tried = _run(victim, run, key, rank, images[left], labels[left], indices[left])
                tried = attack.ball.inside(images[left], tried)
                classes = victim.classify(tried)
                fooled = classes != labels[left]
                found[left[fooled]] = tried[fooled]
                predicted[left[fooled]] = classes[fooled]
                for index in left[fooled]:
                    by[index] = attack.name
        accuracies[attack.name] = float(np.mean(predicted == labels))
    return Attacked(found, clean, predicted, by, accuracies)


def _run(
    victim: Victim,
    run: Callable[[Any, Targets], jax.Array],
    key: jax.Array,
    rank: int,
    images: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
) -> np.ndarray:
    """The adversarial images of a runner, float32 [N, H, W, C]."""
    keys, results = jax.vmap(partial(jax.random.fold_in, key)), [images[:0]]
    for count, (batch, classes, numbers) in victim.batches(images, labels, indices):
        targets = Targets(batch, classes, keys(numbers), jnp.int32(rank))
        results.append(jax.device_get(run(victim.variables, targets))[:count])
    return np.concatenate(results)


def attack_run(
    workdir: Path,
    *,
    norm: str = "linf",
    eps: str | float = "8/255",
    method: str = "apgd",
    steps: int | None = None,
    restarts: int = 1,
    examples: int = 1000,
    seed: int = 0,
    split: str | None = None,
    checkpoint: str = "last",
    ema: bool | None = None,
    data_dir: str | None = None,
    out: Path | None = None,
    alive: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Attacks a saved run on some examples of a split.

    Args:
      workdir, checkpoint, ema: as in `Predictor`.
      norm, eps: the ball, in units of [0, 1]; "8/255".
      method: of METHODS, which contains those before it.
      steps: of PGD and APGD; None: 20 and 100.
      restarts: of each attack that begins at random.
      examples: drawn by the seed without replacement; more than there are: all.
      split, data_dir: as in `evaluate_run`.
      out: a new folder for the adversarial images, PNG of 8 bits, and attack.csv; None: none.

    Returns {"step", "weights", "split", "size", "count", "norm", "eps", "accuracies": {"clean": ..,
    "fgsm": .., ...}, "robust", "interval": (low, high), "clean_interval", "rounded"}: "robust" is
    the accuracy after all attacks, with its 95 % Wilson interval, "rounded" that with the
    adversarial images rounded to 8 bits.
    """
    for flag, name, known in (("norm", norm, NORMS), ("method", method, METHODS)):
        if name not in known:
            raise ConfigError(
                f"--{flag} is {name!r}, which is not known{did_you_mean(name, known)}"
            )
    for flag, number in (("steps", steps), ("restarts", restarts), ("examples", examples)):
        if number is not None and number < 1:
            raise ConfigError(f"--{flag} must be at least 1, got {number}")
    ball = Ball(norm, parse_eps("--eps", eps))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder(out)) if out else None
        predictor, victim = load_victim(workdir, checkpoint, ema)
        pipeline = predictor.restored.experiment.evaluation(split, data_dir)
        pixels, labels, indices = sample(pipeline, examples, seed)
        images = pixels.astype(np.float32) / 255
        attacks = chain(method, ball, steps, victim.num_classes)
        result = attack_images(
            victim,
            images,
            labels,
            attacks,
            indices=indices,
            restarts=restarts,
            seed=seed,
            alive=alive,
        )
        eight_bits = np.round(result.images * 255).astype(np.uint8)
        rounded = victim.classify(eight_bits.astype(np.float32) / 255)
        if folder:
            names = predictor.class_names
            _write(folder, names, result, images, labels, indices, eight_bits, rounded)
    count, accuracies = len(labels), result.accuracies
    right = (result.clean == labels) & (result.predicted == labels)
    return {
        "step": predictor.step,
        "weights": WEIGHTS[predictor.weights],
        "split": pipeline.source.split,
        "size": len(pipeline.source),
        "count": count,
        "norm": norm,
        "eps": ball.eps,
        "accuracies": accuracies,
        "clean_interval": wilson(int(np.sum(result.clean == labels)), count),
        "robust": float(np.mean(right)),
        "interval": wilson(int(right.sum()), count),
        "rounded": float(np.mean(rounded == labels)),
    }


def load_victim(workdir: Path, checkpoint: str, ema: bool | None) -> tuple[Predictor, Victim]:
    """A saved run, and its network as attacks see it."""
    predictor = Predictor(workdir, checkpoint=checkpoint, ema=ema)
    run = predictor.restored
    victim = Victim(
        run.mesh,
        run.experiment.network,
        predictor.variables,
        mean=run.metadata["mean"],
        std=run.metadata["std"],
        batch_size=run.experiment.eval_batch_size,
    )
    return predictor, victim


def sample(
    pipeline: Pipeline, examples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C], labels int32 [N] and numbers int32 [N] of some of a split's."""
    size = len(pipeline.source)
    chosen = np.random.default_rng(seed).permutation(size)[:examples]
    chosen = np.sort(chosen).astype(np.int32)
    images, labels = np.empty((len(chosen), *pipeline.image_shape()), np.uint8), []
    labels, done = np.empty(len(chosen), np.int32), 0
    with contextlib.closing(pipeline.open()) as data:
        for batch in data.evaluation_batches(64):
            batch = {name: np.asarray(array) for name, array in batch.items()}
            for row in np.flatnonzero(np.isin(batch["index"], chosen) & (batch["mask"] > 0)):
                index = batch["index"][row]
                place = np.searchsorted(chosen, index)
                if "image" in batch:
                    images[place], labels[place] = batch["image"][row], batch["label"][row]
                else:
                    images[place] = data.arrays["image"][index]
                    labels[place] = data.arrays["label"][index]
                done += 1
            if done == len(chosen):
                break
    return images, labels, chosen


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `count`, by Wilson's score (1927)."""
    z, share = 1.959964, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _write(
    folder: Path,
    names: Sequence[str],
    result: Attacked,
    images: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    eight_bits: np.ndarray,
    rounded: np.ndarray,
) -> None:
    """The adversarial images as PNG, and attack.csv with a line for each example."""
    offset = result.images.astype(np.float64) - images
    sizes = [distance(norm, offset) for norm in NORMS]
    with (folder / "attack.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row, index in enumerate(indices.tolist()):
            by, file_name = result.by[row], ""
            if by:
                file_name = f"{index:06}.png"
                picture = eight_bits[row]
                picture = picture[..., 0] if picture.shape[-1] == 1 else picture
                Image.fromarray(picture).save(folder / file_name)
            classes = (labels[row], result.clean[row], result.predicted[row], rounded[row])
            true, clean, adversarial, after = (names[number] for number in classes)
            found = (adversarial, after) if by else ("", "")
            lengths = [f"{size[row]:.6g}" for size in sizes]
            table.writerow([index, true, clean, by, *found, *lengths, file_name])
