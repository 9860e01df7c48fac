"""A saved run as a folder that others read: written, certified, and only then there."""

import functools
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flaxcls import augment
from flaxcls.buckets import as_path
from flaxcls.build import accepted
from flaxcls.config import options
from flaxcls.core.losses import evaluated_as
from flaxcls.core.metrics import WEIGHTS
from flaxcls.data.transform import TRANSFORMS, Resize, Transform
from flaxcls.errors import ConfigError
from flaxcls.inference import parity
from flaxcls.inference.predictor import PROBABILITIES, Predictor
from flaxcls.runtime.new_folder import new_folder, written
from flaxcls.runtime.output import say
from flaxcls.weights import export_onnx, export_safetensors, export_savedmodel, export_stablehlo
from flaxcls.weights.exportable import Exportable, Outputs
from flaxcls.weights.pretrained import PRETRAINED

FORMATS = {
    "safetensors": export_safetensors.write,
    "stablehlo": export_stablehlo.write,
    "onnx": export_onnx.write,
    "savedmodel": export_savedmodel.write,
}
_ONE_VIEW = (
    "the export is the network alone, certified without the run's test-time augmentation {}: who "
    "uses it has to average the logits over the views"
)


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    format: str,
    checkpoint: str = "last",
    ema: bool | None = None,
    names: str = "flaxcls",
    license: str | None = None,
    pictures: int | Sequence[str | Path] = 256,
    data_dir: str | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Writes a run's network as the folder `out`, with parity.json in it; returns what that holds.

    Args:
      run, checkpoint, ema: as for Predictor.
      out: a folder that is not there yet, or empty.
      format: one of FORMATS.
      names: of the weights in safetensors.
      license: a line about the weights' licence; None: that of the weights it was fine-tuned
        from, if flaxcls knows them.
      pictures: files to certify with, or how many of the run's evaluation split.
      data_dir: where the data is, if it has moved.
      tolerance: the largest difference of a probability, and of a logit as a share of the largest
        one; None: what the arithmetic allows, see `parity.allowed`.

    Raises ConfigError for what can't be exported, ParityError where the export disagrees with the
    run, OutputError where it can't be written; nothing is in `out` then.
    """
    write = options.look_up("format", format, FORMATS)
    if names not in export_safetensors.NAMES:
        raise ConfigError(f"names must be flaxcls or torch, got {names!r}")
    if names != "flaxcls" and format != "safetensors":
        raise ConfigError(f"--names={names} is for --format=safetensors, not for {format}")
    if format == "safetensors":
        write = functools.partial(write, names=names)
    count, files = (pictures, []) if isinstance(pictures, int) else (0, [*map(str, pictures)])
    if not count and not files:
        raise ConfigError("--pictures must be at least 1, or pictures be named: got none")
    out = as_path(out, "--out=")
    with new_folder(out) as folder:
        predictor = Predictor(run, checkpoint=checkpoint, ema=ema, tta="none")
        if tta := predictor.restored.metadata["config"]["eval"].get("tta"):
            say(f"note: {_ONE_VIEW.format(tta)}", error=True)
        examples = parity.choose(predictor, files, count, data_dir)
        model = exportable(predictor, license)
        with written(out):
            write(model, folder)
        certificate = parity.certify(predictor, model, folder, examples, tolerance)
        with written(out):
            (folder / "parity.json").write_text(json.dumps(certificate, indent=2) + "\n")
    return certificate


def exportable(predictor: Predictor, license: str | None) -> Exportable:
    """The network of a run, computing in float32, and what is to be known of it."""
    experiment = predictor.restored.experiment
    network = experiment.network
    if any(field.name == "dtype" for field in fields(network)):
        network = network.clone(dtype=jnp.float32)
    to_probabilities = PROBABILITIES[evaluated_as(experiment.loss.name)]
    temperature = predictor.calibration.temperature if predictor.calibration else None

    def classifier(mean: Sequence[float], std: Sequence[float]) -> Callable[..., Outputs]:
        def classify(variables: Any, images: jax.Array) -> Outputs:
            logits = network.apply(variables, augment.normalize(images, mean, std), train=False)
            logits = logits.astype(jnp.float32)
            tempered = logits / temperature if temperature else logits
            return {"logits": logits, "probabilities": to_probabilities(tempered)}

        return classify

    variables = jax.device_get(predictor.variables)
    metadata = _metadata(predictor, license)
    return Exportable(network, variables, predictor.image_shape, classifier, metadata)


def _metadata(predictor: Predictor, license: str | None) -> dict[str, Any]:
    restored = predictor.restored
    model, own = restored.metadata["config"]["model"], accepted.SECTIONS["model"].own
    height, width, channels = predictor.image_shape
    return {
        "class_names": predictor.class_names,
        "image": {"height": height, "width": width, "channels": channels, "dtype": "uint8"},
        "preprocessing": {
            "crop": _describe(restored.experiment.transform),
            "mean": restored.metadata["mean"],
            "std": restored.metadata["std"],
            "formula": "(image / 255 - mean) / std, inside of what computes logits",
        },
        "outputs": evaluated_as(restored.experiment.loss.name),
        **({"calibration": predictor.calibration.as_json()} if predictor.calibration else {}),
        "network": {k: v for k, v in model.items() if v is not None and k not in own},
        "step": predictor.step,
        "weights": WEIGHTS[predictor.weights],
        "license": license or _license(restored.metadata["config"].get("init_from")),
        "flaxcls": importlib.metadata.version("flaxcls"),
    }


def _license(init_from: str | None) -> str:
    if known := PRETRAINED.get(init_from or ""):
        return f"fine-tuned from weights of {known.package}, whose licence is {known.licence}"
    return "nothing is known about the licence of these weights"


def _describe(transform: Transform | None) -> dict[str, Any]:
    """How a picture becomes an image, for who has no flaxcls; a user's own has its name only."""
    if transform is None:  # pictures of another size are stretched
        return {"name": "resize", **asdict(Resize()), "reduce_jpeg": False}
    kinds = {kind: name for name, kind in TRANSFORMS.items()}
    name = kinds.get(type(transform), f"{type(transform).__module__}:{type(transform).__name__}")
    return {"name": name, **asdict(transform), "reduce_jpeg": True}
