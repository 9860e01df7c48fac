"""Writes a saved run in a format that others read, with a certificate that it says the same.

    python -m flaxcls.export --run=DIR --format=FORMAT --out=FOLDER [PICTURES-or-FOLDERS...]

needs the run's folder and some pictures to certify with: those named, or else some of the split
that the run was evaluated on. FOLDER is made, and then holds

  safetensors  model.safetensors: the weights, with --names=torch as torchvision and timm call them
  stablehlo    model.stablehlo for jax.export, for CPUs, GPUs and TPUs, and weights.safetensors
  onnx         model.onnx
  savedmodel   TensorFlow's saved_model.pb and variables

and parity.json. All but safetensors take uint8 images of the network's size, any number of them,
and give logits and probabilities. What becomes of a picture before that, the names of the classes
and the licence are metadata in the file; see docs/export.md.

The export is classified by its own runtime, in a process without flaxcls, from the files of the
pictures on. Where it does not agree with evaluate and predict the exit code is 1, and there is no
FOLDER.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, write_result

FORMATS = ("safetensors", "stablehlo", "onnx", "savedmodel")
FLAGS = cli.common_flags("run", "checkpoint", "ema", "data_dir")
flags.DEFINE_enum("format", None, FORMATS, "Format of the export.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder to make.", flag_values=FLAGS)
flags.DEFINE_enum(
    "names", "flaxcls", ("flaxcls", "torch"), "Of weights in safetensors.", flag_values=FLAGS
)
flags.DEFINE_string("license", None, "A line about the weights' licence.", flag_values=FLAGS)
flags.DEFINE_integer(
    "pictures", 256, "How many of the split to certify with.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_float(
    "tolerance",
    None,
    "Allowed difference of a probability; by the arithmetic, 0.0001 in float32.",
    lower_bound=0.0,
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> None:
    arguments = cli.parse(FLAGS, argv, __doc__, others=True)
    cli.check_run(FLAGS.run)
    if FLAGS.format is None:
        raise ConfigError(f"--format=FORMAT is missing, one of {', '.join(FORMATS)}")
    if FLAGS.out is None:
        raise ConfigError("--out=FOLDER is missing; it will be made")
    pictures = cli.all_pictures(arguments) if arguments else FLAGS.pictures

    from flaxcls.inference import exporter, parity
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    certificate = exporter.export_run(
        cli.folder("run", FLAGS.run),
        cli.folder("out", FLAGS.out),
        pictures=pictures,
        **cli.arguments(FLAGS, "run", "out", "pictures"),
    )
    write_result(f"{parity.describe(certificate)}\n{printable(FLAGS.out)} is written")


if __name__ == "__main__":
    cli.run(main)
