"""Writes networks.json: logits of the references in PyTorch, for tests that do without it.

    python tests/golden/update_networks.py [NAME ...]

The weights follow from the names of the variables, so only the logits are kept. Needs torch,
torchvision and timm.
"""

import importlib.util
import json
import sys
import zlib
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("networks.json")
CLASSES = 5

# Our name -> library, its name there, size of the images.
NETWORKS = {
    "resnet18": ("torchvision", "resnet18", 65),
    "resnet50": ("torchvision", "resnet50", 65),
    "resnext50_32x4d": ("torchvision", "resnext50_32x4d", 65),
    "densenet121": ("torchvision", "densenet121", 65),
    "efficientnet_b0": ("torchvision", "efficientnet_b0", 65),
    "efficientnet_lite0": ("timm", "tf_efficientnet_lite0", 65),
    "mobilenet_v3_small": ("torchvision", "mobilenet_v3_small", 65),
    "mobilenetv4_conv_medium": ("timm", "mobilenetv4_conv_medium", 65),
    "convnext_tiny": ("torchvision", "convnext_tiny", 65),
    "swin_t": ("torchvision", "swin_t", 65),
}


def variables_of(network, size):
    """Variables that tell all layers apart, float32; each follows from its path."""
    from flaxcls import models

    def draw(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = random.standard_normal(shape.shape)
        leaf = name.rpartition("/")[2]
        if leaf == "kernel":
            values /= np.sqrt(np.prod(shape.shape[:-1]))
        elif leaf == "var":
            values = 0.5 + random.random(shape.shape)
        elif leaf == "scale":
            values = 1 + 0.2 * values
        else:
            values *= 0.1
        return values.astype(np.float32)

    return jax.tree.map_with_path(draw, models.shapes(network, (size, size, 3)))


def images_of(size):
    """Normalised images, float32 [2, size, size, 3]."""
    return np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)


def reference_logits(name):
    """What the reference in PyTorch makes of the images with these weights."""
    import torch

    from flaxcls import models
    from flaxcls.weights import torch_names

    path = ROOT / "tests" / "models" / "references.py"
    spec = importlib.util.spec_from_file_location("references", path)
    references = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(references)

    library, theirs, size = NETWORKS[name]
    if library == "torchvision":
        reference = getattr(references.torchvision_models(), theirs)(num_classes=CLASSES)
    else:
        reference = references.timm().create_model(theirs, num_classes=CLASSES)
    network = models.build(name, num_classes=CLASSES)
    state = torch_names.to_torch(network, variables_of(network, size))
    tensors = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in state.items()}
    missing = reference.load_state_dict(tensors, strict=False).missing_keys
    constants = ("num_batches_tracked", "relative_position_index")
    assert all(key.endswith(constants) for key in missing), missing
    images = torch.from_numpy(images_of(size).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return reference.eval()(images).numpy()


def main(*names):
    sys.path.insert(0, str(ROOT))
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or NETWORKS:
        kept[name] = [[float(f"{x:.7g}") for x in row] for row in reference_logits(name).tolist()]
    FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
