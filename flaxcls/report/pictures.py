"""Pictures as a page holds them: data URIs, small."""

import base64
import io
from typing import Any

import jax
import numpy as np
from PIL import Image

from flaxcls import augment
from flaxcls.errors import ConfigError
from flaxcls.inference.restored import RestoredRun
from flaxcls.insight.drawing import overlay
from flaxcls.insight.explanations import METHODS
from flaxcls.runtime import sharding

_HEIGHT = 160  # pixels, of a picture on the page
_SMALL = 64  # up to this height, pictures are kept as they are, as PNG


def with_heat(
    run: RestoredRun, variables: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[str, list[np.ndarray]]:
    """Images, uint8 [N, H, W, C], each with what speaks for its label, int [N], in it beside it.

    Returns the method, Grad-CAM or, for a network without maps, SmoothGrad, and N images
    uint8 [H, 2 W, 3].
    """
    network, metadata = run.experiment.network, run.metadata
    normalized = augment.normalize(images, metadata["mean"], metadata["std"])
    given = np.asarray(normalized), labels.astype(np.int32)
    given = sharding.replicate(run.mesh, given)
    try:
        method = "Grad-CAM"
        heat = METHODS["gradcam"](network)(variables, *given)
    except ConfigError:  # it has no maps
        method = "SmoothGrad"
        heat = METHODS["smoothgrad"](network)(variables, *given)
    coloured = np.broadcast_to(images, (*images.shape[:3], 3)) if images.shape[3] == 1 else images
    pairs = zip(images, coloured, jax.device_get(heat), strict=True)
    return method, [np.concatenate([left, overlay(image, of)], 1) for image, left, of in pairs]


def data_uri(image: np.ndarray) -> str:
    """An image, uint8 [H, W, C] with 1, 3 or 4 channels, as small as a page needs it."""
    picture = Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image)
    kind, content = "png", io.BytesIO()
    if picture.height > _SMALL and picture.mode in ("L", "RGB"):
        kind = "jpeg"
        picture.thumbnail((picture.width, _HEIGHT))
    picture.save(content, kind, **({"quality": 80} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
