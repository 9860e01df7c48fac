"""torchvision's reference input: ImageFolder, PIL, DataLoader with two workers.

RandomResizedCrop(224), RandomHorizontalFlip, ToTensor, Normalize, as in torchvision's
references/classification.
"""

import re
import sys


def import_torchvision():
    """torchvision's transforms, also where its compiled part does not fit PyTorch's CPU build.

    PIL transforms need none of the operators; they only have to be declared.
    """
    from torch import library

    declared = library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision

            return torchvision
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            declared.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]


def batches(folder, batch_size, workers=2):
    """Endless float32 batches of the pictures in `folder`/CLASS."""
    import_torchvision()
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pictures = datasets.ImageFolder(folder, transform)
    # As many passes over the pictures as anyone will ask for, without a pause between them.
    endless = DataLoader(
        pictures,
        batch_size,
        sampler=[i % len(pictures) for i in range(10**6)],
        num_workers=workers,
    )
    yield from endless
