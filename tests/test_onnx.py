"""Networks as ONNX: onnxruntime computes what JAX computes, for batches of any size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.inference.predictor import PROBABILITIES
from flaxcls.weights import consumer, export_onnx
from flaxcls.weights.exportable import Exportable

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def check(classify, shape, folder, network=None, variables=None, rtol=1e-5):
    """Writes `classify(variables, images) -> logits` and compares it on 3 images, and on 1."""

    def classifier(mean, std):
        def outputs(variables, images):
            logits = classify(variables, images)
            return {"logits": logits, "probabilities": jax.nn.softmax(logits)}

        return outputs

    metadata = {"preprocessing": {"mean": [], "std": []}, "flaxcls": "0", "class_names": []}
    network = network or models.build("dense", num_classes=2, widths=(2,))
    model = Exportable(network, variables or {}, shape, classifier, metadata)
    export_onnx.write(model, folder)
    run, _ = consumer.load(folder, metadata)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    expected = jax.jit(model.classify)(model.variables, images)
    for count in (3, 1):
        logits, probabilities = run(images[:count])
        scale = np.abs(expected["logits"]).max()
        np.testing.assert_allclose(logits, expected["logits"][:count], atol=rtol * scale)
        np.testing.assert_allclose(probabilities, expected["probabilities"][:count], atol=rtol)


NETWORKS = {
    "quick": {},
    "torch_convnet": {},
    "cifar_resnet20": {},
    "resnet18": {},
    "densenet_bc": {"depth": 10, "growth": 4},
    "vit": {"patch": 8, "width": 16, "depth": 2, "heads": 2},
    "mixer": {"patch": 8, "width": 16, "depth": 2},
    "convnext": {"depths": (1, 1), "width": 8},
    "swin": {"depths": (2, 1), "width": 8, "head_width": 4, "window": 4},
}
VGG11 = pytest.param("vgg11", {}, marks=pytest.mark.torture)  # 129 million parameters
OTHERS = ("mobilenet_v3_small", "efficientnet_b0", "mobilenetv4_conv_medium", "resnet50d")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *NETWORKS.items(),
        VGG11,
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_network_computes_the_same(name, options, tmp_path):
    network = models.build(name, num_classes=5, **options)
    shape, random = (32, 32, 3), np.random.default_rng(0)

    def noise(path, leaf):
        values = 0.1 * random.normal(size=leaf.shape)
        near_one = path[-1].key in ("scale", "var")
        return (near_one + values).astype(np.float32)

    variables = jax.tree.map_with_path(noise, models.shapes(network, shape))

    def classify(variables, images):
        return network.apply(variables, images.astype(jnp.float32) / 255, train=False)

    check(classify, shape, tmp_path, network, variables)


def flat(x):
    return x.reshape(x.shape[0], -1)


RANDOM = np.random.default_rng(1)
MATRIX = RANDOM.normal(size=(6, 6)).astype(np.float32)
TENSOR = RANDOM.normal(size=(2, 3, 6)).astype(np.float32)
OPERATIONS = {  # of x, float32 [B, 6, 4, 3]
    "strides": lambda x: flat(x[:, 1::2, ::3]),
    "row": lambda x: flat(x[:, 2]),
    "last": lambda x: flat(x[:, -1, :, 0]),
    "rolled": lambda x: flat(jnp.roll(x, (1, -1), (1, 2))),
    "flipped": lambda x: flat(x[:, ::-1, ::-1]),
    "picked": lambda x: flat(x[:, jnp.array([3, 0, 3])]),
    "padded": lambda x: flat(jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=7)),
    "cropped by padding": lambda x: jax.lax.pad(flat(x), 0.0, [(0, 0, 0), (-1, 2, 0)]),
    "average pool": lambda x: flat(nn.avg_pool(x, (3, 2), (2, 2), "SAME")),
    "max pool": lambda x: flat(nn.max_pool(x, (3, 3), (2, 1), ((1, 1), (1, 0)))),
    "split": lambda x: flat(jnp.split(x, [1, 3], axis=1)[1]),
    "sorted": lambda x: jnp.sort(flat(x)),
    "cumulated": lambda x: jnp.cumsum(flat(x), axis=1) / 100,
    "best": lambda x: jax.nn.one_hot(jnp.argmax(flat(x), axis=1), 72),
    "clipped": lambda x: flat(jnp.clip(x, 20, 100)),
    "chosen": lambda x: flat(jnp.where(x > 100, x, -x)),
    "normalized": lambda x: flat((x - x.mean(1, keepdims=True)) / (x.std(2) + 1)[:, :, None]),
    "activations": lambda x: flat(nn.silu(x / 99) + nn.gelu(x / 99) + nn.elu(x / 99)),
    "powers": lambda x: flat((x / 99) ** 3 + jnp.sqrt(x) + jnp.expm1(x / 255) + jnp.log1p(x)),
    "matrix": lambda x: flat(jnp.einsum("bhwc,hk->bkwc", x, MATRIX)),
    "matrix from the left": lambda x: flat(jnp.einsum("kh,bhwc->kbwc", MATRIX, x).swapaxes(0, 1)),
    "two axes": lambda x: flat(jnp.einsum("bhwc,chk->bwk", x[:, :3, :, :2], TENSOR)),
    "attention": lambda x: flat(jnp.einsum("bhwc,bkwc->bwhk", x, x) / 255**2),
    "several free axes": lambda x: flat(jnp.einsum("bhwc,bkc->bhwk", x, x[:, :, 0]) / 255**2),
    "outer": lambda x: flat(x[:, :, 0, 0, None] * x[:, None, :, 0, 1]) / 255**2,
    "constants in the batch": lambda x: flat(
        jnp.concatenate([jnp.broadcast_to(jnp.float32(3), (x.shape[0], 1, 4, 3)), x], axis=1)
    ),
    "transposed": lambda x: flat(x.transpose(0, 3, 1, 2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_computes_the_same(name, tmp_path):
    check(lambda _, images: OPERATIONS[name](images.astype(jnp.float32)), (6, 4, 3), tmp_path)


@pytest.mark.parametrize("loss", PROBABILITIES)
def test_probabilities_of_every_loss_compute_the_same(loss, tmp_path):
    def classify(_, images):
        return PROBABILITIES[loss](images.reshape(images.shape[0], -1).astype(jnp.float32) / 255)

    check(classify, (2, 2, 3), tmp_path)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: jnp.fft.fft(flat(x)).real, "the operation fft"),
        (lambda x: jax.lax.pad(flat(x), 0.0, [(0, 0, 0), (0, 0, 1)]), "padding between elements"),
        (lambda x: jax.lax.top_k(flat(x), 2)[0], "the operation top_k"),
    ],
)
def test_what_has_no_counterpart_is_named(function, sentence, tmp_path):
    with pytest.raises(ConfigError, match=f"dense can't be written as ONNX: {sentence} has no"):
        check(lambda _, images: function(images.astype(jnp.float32)), (6, 4, 3), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_follows_from_the_weights_is_not_in_the_graph(tmp_path):
    import onnx

    network = models.build("resnet18", num_classes=5)
    shapes = models.shapes(network, (32, 32, 3))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    check(
        lambda v, x: network.apply(v, x.astype(jnp.float32), train=False),
        (32, 32, 3),
        tmp_path,
        network,
        zeros,
        rtol=1.0,
    )
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Conv") == 20 and kinds.count("MaxPool") == 1
    assert not {"Sqrt", "Reciprocal", "Expand", "Gather"} & {*kinds}
