"""A network as ONNX, for onnxruntime, OpenVINO, TensorRT and others."""

from pathlib import Path

import jax

from flaxcls.errors import ConfigError
from flaxcls.weights.exportable import Exportable, as_text, cannot, symbolic_images
from flaxcls.weights.onnx_graph import OPSET, Graph, Unsupported, Value

_IR_VERSION = 8  # the oldest that goes with the opset: what reads newer ones reads it


def write(model: Exportable, folder: Path) -> None:
    """Writes model.onnx: "image" uint8 [batch, H, W, C] -> "logits" and "probabilities", float32.

    Raises ConfigError where a package is missing or an operation of the network has no counterpart.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401, to certify with
        from onnx import helper
    except ImportError as error:
        raise ConfigError("--format=onnx needs onnx: pip install 'flaxcls[export]'") from error
    from flaxcls.weights.onnx_operators import convert

    images = symbolic_images(model)
    try:
        traced = jax.make_jaxpr(lambda x: model.classify(model.variables, x))(images)
    except Exception as error:  # whatever a network does with a size that is no number
        raise cannot(model, error) from error
    graph = Graph("image")
    try:
        outputs = convert(graph, traced.jaxpr, traced.consts, [Value("image", images.shape)])
    except Unsupported as error:
        name = model.network.name or type(model.network).__name__
        raise ConfigError(
            f"the network {name} can't be written as ONNX: {error} has no counterpart there"
        ) from error
    names = ("logits", "probabilities")  # in the order of jax.tree
    for name, value, aval in zip(names, outputs, traced.out_avals, strict=True):
        graph.output(graph.expand(value, aval.shape), name)
    graph.keep(names)
    tensor, float32 = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    image = tensor("image", onnx.TensorProto.UINT8, ["batch", *model.image_shape])
    classes = traced.out_avals[0].shape[1]
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "flaxcls",
            [image],
            [tensor(name, float32, ["batch", classes]) for name in names],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="flaxcls",
        producer_version=model.metadata["flaxcls"],
    )
    helper.set_model_props(proto, as_text({**model.metadata, "opset": OPSET}))
    onnx.checker.check_model(proto, full_check=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
