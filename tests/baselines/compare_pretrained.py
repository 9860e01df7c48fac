"""EfficientNet-Lite by its known weights, beside timm's networks with the same weights.

    python tests/baselines/compare_pretrained.py --data_dir=DIR [--name=efficientnet_lite0]

DIR has TFDS' imagenet2012. Each network is given the images of its own library's evaluation, and
ours timm's as well, for the difference of the logits. Needs torch, timm and `flaxcls[weights]`.
"""

import argparse
import importlib.util
import io
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from flaxcls import models
from flaxcls.data import open_source
from flaxcls.data.decode import Picture
from flaxcls.data.transform import CenterCrop
from flaxcls.weights import pretrained, torch_names
from flaxcls.weights.initial import initial_weights

_spec = importlib.util.spec_from_file_location(
    "references", Path(__file__).parents[1] / "models" / "references.py"
)
references = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(references)
torch = references.torch
BATCH = 20


def compare(name: str, data_dir: str, splits: list[str]) -> None:
    """Prints accuracies and the largest difference of the logits."""
    timm, known = references.timm(), pretrained.PRETRAINED[name]
    network = models.build(known.network, num_classes=1000)
    variables = initial_weights(network, (known.image_size,) * 2 + (3,), name).variables
    run = jax.jit(lambda x: network.apply(variables, x, train=False))
    theirs = timm.create_model(f"tf_{known.network}").eval()
    state = torch_names.to_torch(network, variables)
    state = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}
    left = theirs.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(theirs.pretrained_cfg, verbose=False)
    )
    crop = CenterCrop(interpolation=known.interpolation, ratio=known.crop_ratio)

    ranks, difference, size = {"flaxcls": [], "timm": []}, 0.0, 0.0
    for split in splits:
        source = open_source("imagenet2012", split, data_dir=data_dir)
        for start in range(0, len(source), BATCH):
            examples = [source[i] for i in range(start, min(start + BATCH, len(source)))]
            labels = np.array([example.label for example in examples])
            pictures = [Image.open(io.BytesIO(e.image)).convert("RGB") for e in examples]
            theirs_in = torch.stack([transform(picture) for picture in pictures])
            ours_in = [
                crop(Picture(e.image, 3, where=split, max_pixels=10**9), known.image_size, ())
                for e in examples
            ]
            ours_in = (np.stack(ours_in) / np.float32(255) - known.mean) / known.std
            with torch.no_grad():
                logits = theirs(theirs_in).numpy()
            same = np.asarray(run(np.ascontiguousarray(theirs_in.numpy().transpose(0, 2, 3, 1))))
            difference = max(difference, np.abs(same - logits).max())
            size = max(size, np.abs(logits).max())
            for library, result in (
                ("flaxcls", np.asarray(run(ours_in.astype(np.float32)))),
                ("timm", logits),
            ):
                order = np.argsort(-result, axis=1)
                ranks[library] += list((order == labels[:, None]).argmax(axis=1))
    for library, found in ranks.items():
        found = np.array(found)
        print(
            f"{name} {library}: top-1 {np.sum(found < 1)} and top-5 {np.sum(found < 5)} of "
            f"{len(found)}, {np.mean(found < 1):.2%} and {np.mean(found < 5):.2%}"
        )
    print(f"{name}: logits of the same images differ by {difference:.1e}, largest {size:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--name", choices=pretrained.PRETRAINED, nargs="*")
    parser.add_argument("--split", nargs="*", default=["validation", "train"])
    arguments = parser.parse_args()
    for name in arguments.name or pretrained.PRETRAINED:
        compare(name, arguments.data_dir, arguments.split)


if __name__ == "__main__":
    main()
