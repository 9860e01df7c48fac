"""Times the peer: torchvision's or timm's network in PyTorch, compiled, on one workload.

    python benchmarks/gpu/torch_step.py NAME [--tiny] [--rounds=5] [--mode=default]

channels_last, bfloat16 autocast, torch.compile, cuDNN's benchmark mode and fused SGD. All that it
does is in its favour: the batch is ready on the device, float32 and normalised, and nothing is
augmented, measured or checked. The last line is the result as JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from workloads import WORKLOADS, tiny


def cifar_resnet18(num_classes: int) -> torch.nn.Module:
    """ResNet-18 with a 3x3 stem and no max-pool."""
    network = torchvision.models.resnet18(num_classes=num_classes)
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = torch.nn.Identity()
    return network


def vit(name: str, num_classes: int, image_size: int) -> torch.nn.Module:
    import timm

    return timm.create_model(name, num_classes=num_classes, img_size=image_size)


NETWORKS = {
    "resnet50": torchvision.models.resnet50,
    "cifar_resnet18": cifar_resnet18,
    "vit_small_patch16_224": partial(vit, "vit_small_patch16_224"),
    "vit_base_patch16_224": partial(vit, "vit_base_patch16_224"),
    # Without the stochastic depth of 0.1 that torchvision has: flaxcls' has none unless asked for.
    "convnext_tiny": partial(torchvision.models.convnext_tiny, stochastic_depth_prob=0.0),
    "efficientnet_b0": torchvision.models.efficientnet_b0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[n for n, w in WORKLOADS.items() if w.peer])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", default="default", help="torch.compile's; eager: not compiled")
    options = parser.parse_args()
    workload = WORKLOADS[options.name]
    workload = tiny(workload) if options.tiny else workload
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    size = {"image_size": workload.image_size} if workload.peer.startswith("vit_") else {}
    network = NETWORKS[workload.peer](num_classes=workload.num_classes, **size)
    network = network.to(device, memory_format=torch.channels_last)
    shape = (workload.batch_size, 3, workload.image_size, workload.image_size)
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(workload.num_classes, (workload.batch_size,), device=device)
    compiled = network
    if options.mode != "eager":
        compiled = torch.compile(network, mode=options.mode)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )

    def train() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    @torch.no_grad()
    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return compiled(images)

    result = {"batch_size": workload.batch_size, **measure("train", train, options, workload)}
    network.eval()
    result |= measure("forward", forward, options, workload)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps({**result, "peak_gigabytes": peak / 1e9}))


def measure(
    what: str, step: Callable[[], Any], options: argparse.Namespace, workload: Any
) -> dict[str, Any]:
    """Seconds of the first call, which compiles, and images/s of every round but the first."""
    start = time.perf_counter()
    step()
    finish()
    compiled = time.perf_counter() - start
    rates = []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        for _ in range(workload.steps):
            step()
        finish()
        rates.append(workload.steps * workload.batch_size / (time.perf_counter() - start))
    rate = statistics.median(rates[1:])
    return {
        f"{what}_compile_seconds": compiled,
        f"{what}_images_per_second": rate,
        f"{what}_milliseconds": 1e3 * workload.batch_size / rate,
        f"{what}_rounds": rates[1:],
    }


def finish() -> None:
    """Waits until the device has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
