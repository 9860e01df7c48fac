"""Networks against PyTorch modules with the same weights, in evaluation and in training.

The PyTorch modules give their layers our names, so one function converts all weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.models.resnet import BasicBlock, BottleneckBlock, CifarResNet, ResNet

torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional


def to_flax(module):
    """The variables of a PyTorch module: OIHW becomes HWIO, [out, in] becomes [in, out]."""
    variables = {"params": {}, "batch_stats": {}}
    for path, tensor in module.state_dict().items():
        *layers, leaf = path.split(".")
        if leaf == "num_batches_tracked":
            continue
        array = tensor.detach().numpy().copy()
        name = {"running_mean": "mean", "running_var": "var", "bias": "bias"}.get(leaf)
        if leaf == "weight":
            name = {4: "kernel", 2: "kernel", 1: "scale"}[array.ndim]
            array = array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])
        tree = variables["batch_stats" if name in ("mean", "var") else "params"]
        for layer in layers:
            tree = tree.setdefault(layer, {})
        tree[name] = array
    return variables if variables["batch_stats"] else {"params": variables["params"]}


def conv(inputs, outputs, size, strides=1, padding=0):
    return nn.Conv2d(inputs, outputs, size, strides, padding, bias=False)


class Block(nn.Module):
    """A ResNet block, basic or bottleneck, by its list of (kernel size, width, stride)."""

    def __init__(self, inputs, width, strides, bottleneck):
        super().__init__()
        features = 4 * width if bottleneck else width
        plan = [(3, width, strides), (3, width, 1)]
        if bottleneck:
            plan = [(1, width, 1), (3, width, strides), (1, features, 1)]
        self.depth = len(plan)
        before = inputs
        for i, (size, after, step) in enumerate(plan, start=1):
            self.add_module(f"conv{i}", conv(before, after, size, step, size // 2))
            self.add_module(f"norm{i}", nn.BatchNorm2d(after))
            before = after
        self.project = strides != 1 or inputs != features
        if self.project:
            self.shortcut_conv = conv(inputs, features, 1, strides)
            self.shortcut_norm = nn.BatchNorm2d(features)

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.depth else y
        return torch.relu(y + (self.shortcut_norm(self.shortcut_conv(x)) if self.project else x))


class TorchResNet(nn.Module):
    def __init__(self, bottleneck, stem):
        super().__init__()
        expansion = 4 if bottleneck else 1
        self.stem = stem
        self.conv1 = conv(3, 8, 7, 2, 3) if stem == "imagenet" else conv(3, 8, 3, 1, 1)
        self.norm1 = nn.BatchNorm2d(8)
        self.stage1_block1 = Block(8, 8, 1, bottleneck)
        self.stage2_block1 = Block(8 * expansion, 16, 2, bottleneck)
        self.stage2_block2 = Block(16 * expansion, 16, 1, bottleneck)
        self.head = nn.Linear(16 * expansion, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, 2, 1) if self.stem == "imagenet" else x
        x = self.stage2_block2(self.stage2_block1(self.stage1_block1(x)))
        return self.head(x.mean((2, 3)))


class TorchCifarResNet8(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = conv(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        before = 16
        for stage, width in ((1, 16), (2, 32), (3, 64)):
            name = f"stage{stage}_block1"
            self.add_module(f"{name}_conv1", conv(before, width, 3, 1 if stage == 1 else 2, 1))
            self.add_module(f"{name}_norm1", nn.BatchNorm2d(width))
            self.add_module(f"{name}_conv2", conv(width, width, 3, 1, 1))
            self.add_module(f"{name}_norm2", nn.BatchNorm2d(width))
            before = width
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        for name in ("stage1_block1", "stage2_block1", "stage3_block1"):
            conv1, norm1, conv2, norm2 = (
                getattr(self, f"{name}_{part}") for part in ("conv1", "norm1", "conv2", "norm2")
            )
            y = norm2(conv2(torch.relu(norm1(conv1(x)))))
            if y.shape != x.shape:  # option A
                extra = (y.shape[1] - x.shape[1]) // 2
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
            x = torch.relu(x + y)
        return self.head(x.mean((2, 3)))


class TorchWideBlock(nn.Module):
    def __init__(self, inputs, width, strides):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, strides, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, 1, 1)
        self.project = strides != 1 or inputs != width
        if self.project:
            self.shortcut_conv = conv(inputs, width, 1, strides)

    def forward(self, x):
        y = torch.relu(self.norm1(x))
        x = self.shortcut_conv(y) if self.project else x
        return x + self.conv2(torch.relu(self.norm2(self.conv1(y))))


class TorchWideResNet10(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = conv(3, 16, 3, 1, 1)
        self.stage1_block1 = TorchWideBlock(16, 16 * width, 1)
        self.stage2_block1 = TorchWideBlock(16 * width, 32 * width, 2)
        self.stage3_block1 = TorchWideBlock(32 * width, 64 * width, 2)
        self.norm1, self.head = nn.BatchNorm2d(64 * width), nn.Linear(64 * width, 5)

    def forward(self, x):
        x = self.stage3_block1(self.stage2_block1(self.stage1_block1(self.conv1(x))))
        return self.head(torch.relu(self.norm1(x)).mean((2, 3)))


def resnet(bottleneck, stem):
    block = BottleneckBlock if bottleneck else BasicBlock
    return ResNet(num_classes=5, stage_sizes=(1, 2), block=block, width=8, stem=stem)


NETWORKS = {
    "basic": lambda: (resnet(False, "imagenet"), TorchResNet(False, "imagenet")),
    "bottleneck": lambda: (resnet(True, "imagenet"), TorchResNet(True, "imagenet")),
    "cifar_stem": lambda: (resnet(False, "cifar"), TorchResNet(False, "cifar")),
    "cifar_resnet": lambda: (CifarResNet(num_classes=5, depth=8), TorchCifarResNet8()),
    "wide": lambda: (models.build("wrn", num_classes=5, depth=10, width=2), TorchWideResNet10(2)),
    "wide_1": lambda: (models.build("wrn", num_classes=5, depth=10, width=1), TorchWideResNet10(1)),
}


def randomize_norms(reference):
    """Scales, biases and running statistics that a wrong use of them would show."""
    for layer in reference.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_residual_networks_equal_pytorch(name):
    torch.manual_seed(0)
    module, reference = NETWORKS[name]()
    randomize_norms(reference)
    variables = to_flax(reference)
    # Odd sizes: a padding on the wrong side would show.
    image = np.random.default_rng(0).normal(size=(3, 3, 19, 22)).astype(np.float32)
    nhwc = jnp.asarray(image.transpose(0, 2, 3, 1))

    initial = jax.eval_shape(lambda key: module.init(key, nhwc, train=False), jax.random.key(0))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, initial)

    reference.eval()
    logits = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, nhwc)
    np.testing.assert_allclose(
        logits, reference(torch.tensor(image)).detach(), rtol=1e-3, atol=1e-4
    )

    reference.train()
    counts = {}  # values a channel in each BatchNorm's batch
    for path, layer in reference.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda _, inputs, output, path=path: counts.update({path: output[:, 0].numel()})
            )
    logits, state = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, nhwc
    )
    expected = reference(torch.tensor(image)).detach()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)

    # The running mean is the same. To the running variance Flax adds the batch's biased variance,
    # PyTorch n / (n - 1) times that, so the two steps from the old value differ by this factor.
    before, after = variables["batch_stats"], to_flax(reference)["batch_stats"]
    for path, count in counts.items():
        old, ours, theirs = before, state["batch_stats"], after
        for layer in path.split("."):
            old, ours, theirs = old[layer], ours[layer], theirs[layer]
        np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-4, atol=1e-5)
        unbiased = (ours["var"] - 0.9 * old["var"]) * count / (count - 1)
        np.testing.assert_allclose(0.9 * old["var"] + unbiased, theirs["var"], rtol=1e-4, atol=1e-5)


class TorchTutorial(nn.Module):
    """The three tutorial networks, with the flattening order of NHWC."""

    def __init__(self, name, spatial, pool):
        super().__init__()
        padding = 1 if name == "torch_convnet" else 0
        self.conv1 = nn.Conv2d(3, 32, 3, padding=padding)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=padding)
        if name == "keras_cnn":
            self.conv3 = nn.Conv2d(64, 64, 3)
        width = {"keras_cnn": 64, "torch_convnet": 512, "keras_small": None}[name]
        if width:
            self.hidden = nn.Linear(64 * spatial, width)
        self.head = nn.Linear(width or 64 * spatial, 10)
        self.pool = {"max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2)}[pool]

    def forward(self, x):
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.relu(self.conv3(x)) if hasattr(self, "conv3") else x
        x = x.permute(0, 2, 3, 1).flatten(1)
        x = torch.relu(self.hidden(x)) if hasattr(self, "hidden") else x
        return self.head(x)


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize(
    ("name", "spatial"), [("keras_cnn", 6), ("keras_small", 20), ("torch_convnet", 30)]
)
def test_tutorial_networks_equal_pytorch(name, spatial, pool):
    torch.manual_seed(0)
    reference = TorchTutorial(name, spatial, pool)
    image = np.random.default_rng(0).normal(size=(2, 3, 22, 26)).astype(np.float32)
    module = models.build(name, num_classes=10, pool=pool)
    logits = jax.jit(lambda v, x: module.apply(v, x, train=True))(
        to_flax(reference), image.transpose(0, 2, 3, 1)
    )
    np.testing.assert_allclose(
        logits, reference(torch.tensor(image)).detach(), rtol=1e-4, atol=1e-5
    )


def test_the_flattening_of_torch_convnet_is_a_transposition_of_pytorchs():
    weight = np.random.default_rng(0).normal(size=(512, 64 * 2 * 3)).astype(np.float32)
    features = np.random.default_rng(1).normal(size=(4, 64, 2, 3)).astype(np.float32)
    kernel = weight.reshape(512, 64, 2, 3).transpose(2, 3, 1, 0).reshape(-1, 512)
    ours = features.transpose(0, 2, 3, 1).reshape(4, -1) @ kernel
    np.testing.assert_allclose(ours, features.reshape(4, -1) @ weight.T, rtol=1e-3, atol=1e-3)
