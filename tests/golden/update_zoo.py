"""Writes flaxcls/models/zoo.json: what `--list=models` shows of each network.

    python tests/golden/update_zoo.py [NAME ...]

Parameters and floating-point operations (two for a multiplication and an addition) are those of an
image of the usual size and as many classes, by XLA's analysis of the forward pass as it is written,
before any compilation.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "flaxcls" / "models" / "zoo.json"

# The first pattern that a name begins with tells the input, the classes and the source.
IMAGENET, CIFAR = ((224, 224, 3), 1000), ((32, 32, 3), 10)
USUAL = (
    ("dense$", (28, 28, 1), 10, "flaxcls"),
    ("digits_cnn", (8, 8, 1), 10, "flaxcls"),
    ("quick", *CIFAR, "airbench94"),
    ("keras_cnn", *CIFAR, "TensorFlow's tutorial"),
    ("keras_small", *CIFAR, "Keras' example"),
    ("torch_convnet", *CIFAR, "PyTorch's tutorials"),
    ("cifar_resnet", *CIFAR, "arXiv:1512.03385"),
    ("wrn", *CIFAR, "arXiv:1605.07146"),
    ("densenet_bc", *CIFAR, "arXiv:1608.06993"),
    ("cifar_alexnet", *CIFAR, "bearpaw"),
    ("cifar_vgg", *CIFAR, "chenyaofo"),
    ("resnet50d", *IMAGENET, "timm"),
    ("efficientnet_(b1|lite1)", (240, 240, 3), 1000, None),
    ("efficientnet_(b2|lite2)", (260, 260, 3), 1000, None),
    ("efficientnet_b3", (300, 300, 3), 1000, None),
    ("efficientnet_b4", (380, 380, 3), 1000, None),
    ("efficientnet_lite3", (280, 280, 3), 1000, None),
    ("efficientnet_lite4", (300, 300, 3), 1000, None),
    ("mobilenetv4", (256, 256, 3), 1000, "timm"),
    ("vit|deit3|mixer", *IMAGENET, "timm"),
    ("", *IMAGENET, None),
)


def row(name):
    """What zoo.json says of a network."""
    import jax
    import jax.numpy as jnp

    from flaxcls import models
    from flaxcls.weights.pretrained import PRETRAINED

    _, shape, classes, source = next(usual for usual in USUAL if re.match(usual[0], name))
    network = models.build(name, num_classes=classes)
    variables = models.shapes(network, shape)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    forward = jax.jit(lambda variables, images: network.apply(variables, images, train=False))
    cost = forward.trace(variables, image).lower(lowering_platforms=("cpu",)).cost_analysis()
    return {
        "parameters": models.parameter_count(variables["params"]),
        "flops": int(cost["flops"]),
        "input": shape,
        "classes": classes,
        "source": source or ("timm" if "lite" in name else "torchvision"),
        "imports": hasattr(network, "torch_names"),
        "weights": PRETRAINED[name].package if name in PRETRAINED else None,
    }


def main(*names):
    sys.path.insert(0, str(ROOT))
    from flaxcls import models

    kept = json.loads(FILE.read_text()) if names else {}
    rows = {**kept, **{name: row(name) for name in names or models.MODELS}}
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in models.MODELS]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
