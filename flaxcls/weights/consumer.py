"""Classifies pictures by an exported network alone: what the file says of itself, its own runtime.

    python consumer.py FOLDER REQUEST.json ANSWER.npz

It shares no code with flaxcls, so that the parity certificate compares two programs: pictures are
decoded and cropped by Pillow (and OpenCV, where no antialiasing is asked for) as the metadata in
the export say, and given to onnxruntime, JAX, TensorFlow or PyTorch. It also shows how to use an
export: it can be copied.

The request is {"pictures": [paths]}, or {"images": path of a .npy, uint8 [N, H, W, C]} for what is
cropped already. The answer has "images", and "logits", "probabilities" and "runtime" where
something ran.
"""

import itertools
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}
_RIBBON = 16  # of a picture longer than that many times its other side, the middle
_BATCH = 24


def read_metadata(folder: Path) -> dict:
    """What an export says of itself, by the kind of its file."""
    if (onnx := folder / "model.onnx").exists():
        import onnxruntime

        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        entries = session.get_modelmeta().custom_metadata_map
    elif (weights := folder / "model.safetensors").exists():
        with weights.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(size))["__metadata__"]
    else:
        return json.loads((folder / "metadata.json").read_bytes())
    return {name: json.loads(text) for name, text in entries.items() if name != "format"}


def crop(picture: Path, image: dict, crop: dict) -> np.ndarray:
    """A picture's file as the network's image, uint8 [H, W, C]; `image` and `crop` are metadata."""
    height, width, channels = image["height"], image["width"], image["channels"]
    mode = "RGB" if channels == 3 else "L"
    with Image.open(picture) as file:
        tall, wide = file.size[::-1]
        if file.getexif().get(0x0112) in (5, 6, 7, 8):  # it lies on its side
            tall, wide = wide, tall
        box, shape, (top, left) = _geometry(tall, wide, (height, width), crop)
        if file.format in ("JPEG", "MPO") and file.mode in ("RGB", "L"):
            zoom = min(box[2] / shape[0], box[3] / shape[1])
            reduction = next((r for r in (8, 4, 2) if zoom >= 2 * r), 1)
            reduction = reduction if crop["reduce_jpeg"] else 1
            # Decodes a smaller JPEG, and grey from its luma.
            file.draft(mode, (file.size[0] // reduction, file.size[1] // reduction))
        if file.mode.startswith("I"):  # 16 bits
            file = Image.fromarray((np.asarray(file) >> 8).clip(0, 255).astype(np.uint8))
        pixels = ImageOps.exif_transpose(file).convert(mode)
    if pixels.size != (wide, tall):
        factor = round(wide / pixels.size[0])
        box = tuple(side / factor for side in box)
    resized = _resize(pixels, box, shape, crop).reshape(*shape, channels)
    if crop["name"] != "pad":
        return resized[top : top + height, left : left + width]
    result = np.full((height, width, channels), crop["fill"], np.uint8)
    result[top : top + shape[0], left : left + shape[1]] = resized
    return result


def _geometry(tall, wide, size, crop):
    """Which box (top, left, height, width) is resized to which shape, and where the image begins.

    For "pad" it is where the resized picture begins in the image.
    """
    whole, side = (0, 0, tall, wide), size[0]
    if crop["name"] == "resize":
        return whole, size, (0, 0)
    if crop["name"] == "pad":
        scale = side / max(tall, wide)
        shape = max(1, round(tall * scale)), max(1, round(wide * scale))
        return whole, shape, ((side - shape[0]) // 2, (side - shape[1]) // 2)
    height, width = min(tall, _RIBBON * wide), min(wide, _RIBBON * tall)
    short = int(side / crop["ratio"])
    if height <= width:
        shape = short, max(short, int(short * width / height))
    else:
        shape = max(short, int(short * height / width)), short
    box = (tall - height) // 2, (wide - width) // 2, height, width
    return box, shape, tuple(int(round((length - side) / 2)) for length in shape)


def _resize(pixels, box, shape, crop) -> np.ndarray:
    top, left, height, width = box
    if crop["antialias"]:
        # Cut out first: what is beyond the box must not shine into it.
        left_edge, top_edge = math.floor(left), math.floor(top)
        right, bottom = min(math.ceil(left + width), pixels.width), math.ceil(top + height)
        pixels = pixels.crop((left_edge, top_edge, right, min(bottom, pixels.height)))
        left, top = left - left_edge, top - top_edge
        part = left, top, min(left + width, pixels.width), min(top + height, pixels.height)
        return np.asarray(pixels.resize(shape[::-1], _PILLOW[crop["interpolation"]], box=part))
    import cv2

    methods = {
        "bilinear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    top, left, height, width = (round(side) for side in box)
    array = np.asarray(pixels)[top : top + max(height, 1), left : left + max(width, 1)]
    if array.shape[:2] == shape:
        return array
    return cv2.resize(array, shape[::-1], interpolation=methods[crop["interpolation"]])


def load(folder: Path, metadata: dict):
    """`classify(images uint8 [B, H, W, C]) -> (logits, probabilities)` and the runtime's name.

    None where the weights alone were exported, and no PyTorch reference is at hand.
    """
    if (folder / "model.onnx").exists():
        import onnxruntime

        session = onnxruntime.InferenceSession(
            folder / "model.onnx", providers=["CPUExecutionProvider"]
        )
        names = ["logits", "probabilities"]
        return lambda x: session.run(names, {"image": x}), f"onnxruntime {onnxruntime.__version__}"
    if (folder / "model.stablehlo").exists():
        import jax
        from jax import export
        from safetensors.numpy import load_file

        exported = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
        weights = load_file(folder / "weights.safetensors")

        def classify(images):
            outputs = exported.call(weights, images)
            return outputs["logits"], outputs["probabilities"]

        return classify, f"JAX {jax.__version__}"
    if (folder / "saved_model.pb").exists():
        import tensorflow as tf

        signature = tf.saved_model.load(str(folder)).signatures["serving_default"]

        def classify(images):
            outputs = signature(image=tf.constant(images))
            return outputs["logits"].numpy(), outputs["probabilities"].numpy()

        return classify, f"TensorFlow {tf.__version__}"
    return _reference(folder, metadata) if metadata.get("reference") else None


def _reference(folder: Path, metadata: dict):
    """The network of torchvision or timm with the weights, if PyTorch and they are there."""
    wanted = metadata["reference"]
    to_probabilities = {"sigmoid_cross_entropy": "sigmoid", "squared_error": None}
    activation = to_probabilities.get(metadata["outputs"], "softmax")
    if activation is None:  # probabilities would be the nearest point of the simplex
        return None
    try:
        import torch

        if wanted["library"] == "timm":
            import timm

            network = timm.create_model(wanted["name"], **wanted["options"])
        else:
            import torchvision

            network = getattr(torchvision.models, wanted["name"])(**wanted["options"])
    except (ImportError, RuntimeError):  # a library for CUDA raises the second beside another torch
        return None
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    # What only training counts, or what follows from the network's shape, is in no export.
    buffers = ("num_batches_tracked", "relative_position_index", "attn_mask")
    own = {k: v for k, v in network.state_dict().items() if k.endswith(buffers)}
    network.load_state_dict({**own, **state}, strict=True)
    network.eval()
    mean, std = (torch.tensor(metadata["preprocessing"][name]) for name in ("mean", "std"))

    def classify(images):
        with torch.no_grad():
            x = (torch.from_numpy(images).float() / 255 - mean) / std
            logits = network(x.permute(0, 3, 1, 2))
            tempered = logits / metadata.get("calibration", {}).get("temperature", 1)
            shares = tempered.sigmoid() if activation == "sigmoid" else tempered.softmax(1)
            return logits.numpy(), shares.numpy()

    return classify, f"PyTorch {torch.__version__} ({wanted['library']} {wanted['name']})"


def main(folder: Path, request: dict) -> dict[str, np.ndarray]:
    metadata = read_metadata(folder)
    preprocessing = metadata["preprocessing"]
    if "images" in request:
        images = np.load(request["images"])
    else:
        images = np.stack(
            [crop(path, metadata["image"], preprocessing["crop"]) for path in request["pictures"]]
        )
    loaded = load(folder, metadata)
    if loaded is None:
        return {"images": images}
    classify, runtime = loaded
    # Batches of several sizes: 1, the full one, and what is left.
    bounds = sorted({0, 1, *range(1, len(images), _BATCH), len(images)})
    parts = [classify(images[a:b]) for a, b in itertools.pairwise(bounds)]
    logits, probabilities = map(np.concatenate, zip(*parts, strict=True))
    return {
        "images": images,
        "logits": logits,
        "probabilities": probabilities,
        "runtime": np.array(runtime),
    }


if __name__ == "__main__":
    _, place, asked, target = sys.argv
    np.savez(target, **main(Path(place), json.loads(Path(asked).read_bytes())))
