"""Networks beside their references in PyTorch: the same weights, the same logits and gradients.

torchvision's wheels are built for CUDA; with a CPU build of PyTorch their operators don't load, and
are declared here, as no network needs them.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.weights import torch_names

torch = pytest.importorskip("torch")


def torchvision():
    """torchvision; skips the test where it can't be imported."""
    with contextlib.suppress(Exception):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import torchvision
    except Exception as error:
        pytest.skip(f"torchvision can't be imported: {error}")
    return torchvision


def torchvision_models():
    """torchvision.models; skips the test where it can't be imported."""
    return torchvision().models


def timm():
    """timm; skips the test where it can't be imported."""
    torchvision_models()
    return pytest.importorskip("timm")


def randomize(module, seed=0):
    """Gives a PyTorch module weights and BatchNorm statistics that tell all layers apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * noise)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.ndim == 1 or tensor.abs().max() < 1e-3:  # a zero head, a class token
                tensor.copy_(0.1 * noise)
    return module


def compare(name, reference, *, size, train=True, rtol=1e-4, **options):
    """Logits in evaluation and, with `train`, those and the gradients of a training step.

    Errors are relative to the largest value of what is compared. The training step is computed in
    float64, where a rounding can't move a ReLU across zero. Returns the errors.
    """
    randomize(reference)
    network = models.build(name, num_classes=reference_classes(reference), **options)
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    state = {key: value.numpy() for key, value in reference.state_dict().items()}
    variables = torch_names.from_torch(network, models.shapes(network, images.shape[1:]), state)
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert models.parameter_count(variables["params"]) == count

    quickly = {"xla_backend_optimization_level": 0}  # compiled: it runs only once
    apply = jax.jit(lambda v, x: network.apply(v, x, train=False), compiler_options=quickly)
    ours = apply(variables, images)
    with torch.no_grad():
        theirs = reference.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    errors = {"logits": _error(ours, theirs)}
    if train:
        errors |= _training_errors(network, variables, reference, images)
    back = torch_names.to_torch(network, variables)
    assert all(np.array_equal(back[key], state[key]) for key in back)
    assert all(error <= rtol for error in errors.values()), (name, errors)
    return errors


def reference_classes(reference):
    """How many logits a reference has: those of its last linear layer."""
    layers = [m for m in reference.modules() if isinstance(m, torch.nn.Linear)]
    return layers[-1].out_features


def _training_errors(network, variables, reference, images):
    """Of the logits and the gradients of one training step without dropout, in float64."""
    with jax.enable_x64(True):
        double = network.clone(dtype=jnp.float64)
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        labels = jnp.asarray([1, 2])

        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            logits, _ = double.apply(
                {**given, "params": params},
                jnp.asarray(images, jnp.float64),
                train=True,
                rngs=rngs,
                mutable=["batch_stats"],
            )
            logits = logits.astype(jnp.float64)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), labels]), logits

        (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(given["params"])
    reference.double().train()
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    theirs = reference(torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2).copy()))
    torch.nn.functional.cross_entropy(theirs, torch.tensor([1, 2])).backward()
    reference.float()
    flat = torch_names.to_torch(network, {"params": grads})
    expected = {key: p.grad.numpy() for key, p in reference.named_parameters()}
    # A bias before a BatchNorm has no gradient but roundings.
    noise = 1e-6 * max(np.abs(gradient).max() for gradient in expected.values())
    worst = max(_error(flat[key], expected[key], noise) for key in expected)
    return {"training logits": _error(ours, theirs.detach().numpy()), "gradients": worst}


def _error(ours, theirs, noise=1e-12):
    scale = max(float(np.abs(theirs).max()), noise)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max()) / scale
