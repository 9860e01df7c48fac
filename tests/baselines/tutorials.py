"""The programs of the tutorials, as their authors wrote the training: images/s of a second epoch.

    python tests/baselines/tutorials.py PROGRAM IMAGES.npz

PROGRAM is keras_cnn or keras_small (by the backend of KERAS_BACKEND), torch_convnet or
torch_resnet18; IMAGES.npz has "image" uint8 [N,32,32,3] and "label". `compare_tutorials.py` runs
them beside flaxcls' recipes. The last line printed is the number.
"""

import sys
import time

import numpy as np


def keras_fit(layers, images, labels):
    """model.fit with Adam and batches of 32, the images scaled to [0, 1] beforehand."""
    import keras

    model = keras.Sequential([keras.Input((32, 32, 3)), *layers(keras.layers)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    images = images.astype("float32") / 255
    model.fit(images, labels, batch_size=32, epochs=1, verbose=0)
    start = time.perf_counter()
    model.fit(images, labels, batch_size=32, epochs=1, verbose=0)
    return len(images) / (time.perf_counter() - start)


def keras_cnn(images, labels):
    """https://www.tensorflow.org/tutorials/images/cnn"""
    return keras_fit(
        lambda layers: [
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ],
        images,
        labels,
    )


def keras_small(images, labels):
    """https://keras.io/examples/vision/mnist_convnet without its dropout"""
    return keras_fit(
        lambda layers: [
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Flatten(),
            layers.Dense(10),
        ],
        images,
        labels,
    )


class Pictures:
    """A torch Dataset as torchvision's CIFAR10 is: PIL images, cropped and flipped when read."""

    def __init__(self, images, labels):
        from torchvision_input import import_torchvision

        import_torchvision()
        from torchvision import transforms

        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def torch_fit(network, loader, size, optimizer):
    """An epoch to warm up, and the rate of the next."""
    import torch

    loss = torch.nn.CrossEntropyLoss()
    for _ in range(2):
        start = time.perf_counter()
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            value = loss(network(images), labels)
            value.backward()
            optimizer.step()
            total += value.item()
    return size / (time.perf_counter() - start)


def torch_convnet(images, labels):
    """The ConvNet of the PyTorch tutorials, with a DataLoader of two workers."""
    import torch
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    pictures = Pictures(images, labels)
    loader = torch.utils.data.DataLoader(pictures, 100, shuffle=True, num_workers=2)
    optimizer = torch.optim.SGD(network.parameters(), 0.001, momentum=0.9)
    return torch_fit(network, loader, len(images), optimizer)


def torch_resnet18(images, labels):
    """ResNet-18 for CIFAR-10 in channels_last, float32, its batches of 128 ready in memory."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
            self.shortcut = nn.Sequential(*(shortcut if inputs != outputs else []))

        def forward(self, x):
            return torch.relu(self.branch(x) + self.shortcut(x))

    layers, inputs = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for outputs in (64, 128, 256, 512):
        layers += [Block(inputs, outputs, 1 if outputs == 64 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    network = network.to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(images[: 8 * 128]).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - 0.5).to(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels[: 8 * 128]).long()
    loader = list(zip(pixels.split(128), targets.split(128), strict=True))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    return torch_fit(network, loader, len(pixels), optimizer)


if __name__ == "__main__":
    _, program, path = sys.argv
    with np.load(path) as arrays:
        print(globals()[program](arrays["image"], arrays["label"]))
