"""How a saved run withstands attacks: clean and robust accuracy, and the adversarial images."""

import contextlib
import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxcls.buckets import as_path
from flaxcls.core.metrics import WEIGHTS
from flaxcls.core.perturbation import NORMS, Ball, distance, parse_eps
from flaxcls.core.step import seed_key
from flaxcls.errors import ConfigError, did_you_mean
from flaxcls.insight.attacks import METHODS, Attack, Targets, chain, make_runner
from flaxcls.insight.intervals import wilson
from flaxcls.insight.victim import Victim, load_victim, sample
from flaxcls.runs import robustness_log
from flaxcls.runtime import sharding
from flaxcls.runtime.new_folder import new_folder

_COLUMNS = ("index", "class", "clean", "attack", "adversarial", "rounded", "linf", "l2", "file")


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
                left = np.flatnonzero(predicted == labels)
                if not len(left):
                    continue
                alive(f"{attack.name}: {len(left):,} images are withstood")
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
    run: str | Path,
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
    out: str | Path | None = None,
    alive: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Attacks a saved run on some examples of a split.

    Args:
      run, checkpoint, ema: as in `Predictor`.
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
    adversarial images rounded to 8 bits. It is kept in the run's folder, for its report.
    """
    for flag, name, known in (("norm", norm, NORMS), ("method", method, METHODS)):
        if name not in known:
            raise ConfigError(
                f"--{flag} is {name!r}, which is not known{did_you_mean(name, known)}"
            )
    for flag, number in (("steps", steps), ("restarts", restarts), ("examples", examples)):
        if number is not None and number < 1:
            raise ConfigError(f"--{flag} must be at least 1, got {number}")
    run, ball = as_path(run, "--run="), Ball(norm, parse_eps("--eps", eps))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder(as_path(out, "--out="))) if out else None
        predictor, victim = load_victim(run, checkpoint, ema)
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
    found = {
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
    robustness_log.keep(run, found)
    return found


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
        table.writerow(_COLUMNS)
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
