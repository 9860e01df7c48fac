"""What a saved run says of pictures, and where in them it sees that."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from flaxcls import augment
from flaxcls.buckets import AnyPath
from flaxcls.errors import ConfigError, DataError, did_you_mean
from flaxcls.inference.classifier import Prediction
from flaxcls.inference.predictor import Predictor
from flaxcls.insight import drawing
from flaxcls.insight.explanations import METHODS, TOLERANCE, make_completeness_gap
from flaxcls.runtime import sharding
from flaxcls.runtime.output import printable


class Explanation(NamedTuple):
    """Why a network says what it says of a picture, as far as a heat map can tell."""

    image: np.ndarray  # uint8 [H, W, C], as the network was shown it
    prediction: Prediction
    class_name: str  # of the class that is explained
    heat: np.ndarray  # float32 [H, W], how much each pixel speaks for it; below 0: against it
    method: str
    gap: float | None  # of integrated gradients: see `explanations.make_completeness_gap`

    def draw(self, title: str = "") -> Image.Image:
        """The image with a title and its three best classes, and beside it that with the heat."""
        best = list(self.prediction.probabilities.items())[:3]
        captions = (
            [title, *(f"{name} {share:.1%}" for name, share in best)],
            [f"{self.method}:", self.class_name],
        )
        images = self.image, drawing.overlay(self.image, self.heat)
        return drawing.side_by_side(images, captions, columns=2)

    def note(self) -> str | None:
        """What there is to know before the heat is believed, in words."""
        if not (self.heat > 0).any():
            said = f"nothing speaks for {printable(self.class_name)}, as far as {self.method} tells"
            return said + "; hirescam may tell more" * (self.method == "gradcam")
        if self.gap is not None and not self.gap <= TOLERANCE:
            return (
                "the parts of the pixels add up to the difference of the logit only within "
                f"{self.gap:.1%} of it"
            )
        return None


class Explainer:
    """Explains a saved run's answers: `explainer(images)` is a list of Explanation.

    Args:
      predictor: the run.
      method: one of METHODS.
      class_name: of the class to explain; None: for each picture that which is predicted.

    Raises ConfigError for a method or a class that there is not, and, when it is called, for a
    network that the method is not for.
    """

    def __init__(self, predictor: Predictor, method: str, class_name: str | None = None):
        names = predictor.class_names
        if method not in METHODS:
            raise ConfigError(f"there is no method {method!r}{did_you_mean(method, METHODS)}")
        if class_name is not None and class_name not in names:
            what = printable(class_name)
            raise ConfigError(f"the run has no class {what!r}{did_you_mean(class_name, names)}")
        if class_name is not None and method == "attention_rollout":
            raise ConfigError("attention_rollout is the same for every class, so it takes none")
        self._predictor, self._method = predictor, method
        self._label = None if class_name is None else names.index(class_name)
        restored = predictor.restored
        network, metadata = restored.experiment.network, restored.metadata
        self._explain = METHODS[method](network)
        self._gap = None
        if method == "integrated_gradients":
            self._gap = jax.jit(make_completeness_gap(network))
        self._normalize = jax.jit(
            lambda images: augment.normalize(images, metadata["mean"], metadata["std"])
        )

    def __call__(self, images: np.ndarray) -> list[Explanation]:
        """Explains images, uint8 [N, *image_shape], as `Predictor.read` makes them."""
        predictor = self._predictor
        predictions = predictor(images)
        labels = predictions.logits.argmax(axis=1)
        if self._label is not None:
            labels = np.full_like(labels, self._label)
        starts = range(0, len(images), predictor.batch_size)
        parts = [self._batch(images, labels, start) for start in starts]
        heats, gaps = map(np.concatenate, zip(*parts, strict=True))
        class_names = [predictor.class_names[label] for label in labels]
        gaps = gaps.tolist() if self._gap else [None] * len(images)
        ranked, methods = predictor.ranked(predictions), [self._method] * len(images)
        rows = zip(images, ranked, class_names, heats, methods, gaps, strict=True)
        return [Explanation(*row) for row in rows]

    def _batch(
        self, images: np.ndarray, labels: np.ndarray, start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Heat and gap of at most a batch, which is filled up with its last image."""
        size = self._predictor.batch_size
        index = np.minimum(np.arange(start, start + size), len(images) - 1)
        batch = {"image": images[index], "label": labels[index].astype(np.int32)}
        batch = sharding.split_batch(self._predictor.restored.mesh, batch)
        arguments = self._predictor.variables, self._normalize(batch["image"]), batch["label"]
        heat = self._explain(*arguments)
        gap = self._gap(*arguments, heat) if self._gap else np.zeros(size)
        count = min(size, len(images) - start)
        return tuple(array[:count] for array in jax.device_get((heat, gap)))


def explain_files(
    run: AnyPath,
    files: Iterable[str],
    *,
    method: str,
    out: Path,
    report: Callable[[DataError], None],
    class_name: str | None = None,
    checkpoint: str = "last",
    ema: bool | None = None,
    batch_size: int = 16,
) -> Iterator[tuple[str, Explanation, Path]]:
    """Explains pictures of files, in their order: yields each with the PNG that is written of it.

    The PNGs are in the folder `out`, which is made, as NAME.METHOD.png; of files of the same name
    the second one's is NAME-2.METHOD.png. Files that can't be read are skipped, and `report` is
    called with what was wrong. The other arguments are those of Explainer and Predictor.
    """
    predictor = Predictor(run, checkpoint=checkpoint, ema=ema, batch_size=batch_size)
    explainer = Explainer(predictor, method, class_name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
        raise ConfigError(f"--out={printable(out)} can't be made a folder: {why}") from error
    seen: dict[str, int] = {}
    for batch in predictor.batches(files, report):
        names, images = zip(*batch, strict=True)
        for name, explanation in zip(names, explainer(np.stack(images)), strict=True):
            stem = Path(name).stem
            seen[stem] = seen.get(stem, 0) + 1
            number = f"-{seen[stem]}" if seen[stem] > 1 else ""
            path = out / f"{stem}{number}.{method}.png"
            drawing.save_png(explanation.draw(Path(name).name), path, "out")
            yield name, explanation, path
