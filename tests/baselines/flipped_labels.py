"""How well the audit finds labels that were flipped on purpose; prints precision and recall.

    python tests/baselines/flipped_labels.py --config=configs/cifar10_quick.py --out=DIR
        [--share=0.05] [--folds=5] [--seed=0] [--config.x=y ...]

A share of the labels of the recipe's training split, whatever the class, becomes another class at
random. The pictures are written as files, with a list of the wrong labels; then the same list is
cross-validated, audited, and what the audit takes for wrong is compared with what was flipped.
The evaluation split is not looked at. The same command with the same --out resumes.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

from flaxcls import build, cli
from flaxcls.files import write_csv
from flaxcls.insight.audit import audit, write_picture
from flaxcls.runtime import compilation_cache
from flaxcls.studies.crossval import cross_validate

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder for everything.", flag_values=FLAGS)
flags.DEFINE_float("share", 0.05, "Of the labels that are flipped.", flag_values=FLAGS)
flags.DEFINE_integer("folds", 5, "Of the cross-validation.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of what is flipped.", flag_values=FLAGS)


def flip(labels: np.ndarray, classes: int, share: float, seed: int) -> np.ndarray:
    """The labels with a share of them, drawn without repetition, as another class."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), round(share * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[chosen] = (labels[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return noisy


def main(argv: list[str]) -> None:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    compilation_cache.enable()
    out = Path(FLAGS.out)
    config = cli.load_config(FLAGS.config, overrides)
    source = build.source(config, config.data.train_split)
    true = source.labels()
    noisy = flip(true, len(source.class_names), FLAGS.share, FLAGS.seed)
    listed = out / "noisy.csv"
    if not listed.exists():
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            (write_picture(out, source, "train", i), source.class_names[label])
            for i, label in enumerate(noisy)
        ]
        # A list without splits would hold some back: one picture of each class to evaluate on.
        first = {int(np.flatnonzero(noisy == label)[0]) for label in np.unique(noisy)}
        tests = [(*rows[i], "test") for i in sorted(first)]
        write_csv(listed, ("path", "label", "split"), [*((*row, "train") for row in rows), *tests])
    if config.image_size is None:
        config.image_size = source.image_shape[0]
        config.crop.name = "resize"
    config.data.name, config.data.path, config.data.dir = "list", str(listed), None
    config.data.channels = source.image_shape[2]
    config.data.train_split, config.data.eval_split = "train", "test"
    results = cross_validate(config, out / "study", FLAGS.folds)
    found = audit(out / "study")
    suspects = read_suspects(out / "study" / "audit" / "labels.csv")
    flipped = {f"{i:07}" for i in np.flatnonzero(noisy != true)}
    hits = suspects & flipped
    print(
        json.dumps(
            {
                "examples": len(true),
                "flipped": len(flipped),
                "found": found["label_issues"],
                "precision": round(len(hits) / max(1, len(suspects)), 4),
                "recall": round(len(hits) / len(flipped), 4),
                "out-of-fold accuracy on the noisy labels": results["out_of_fold"]["accuracy"],
            },
            indent=2,
        )
    )


def read_suspects(path: Path) -> set[str]:
    """The names of the pictures' files, without folder and ending."""
    with path.open() as file:
        return {Path(row["file"]).stem for row in csv.DictReader(file)}


if __name__ == "__main__":
    main(sys.argv)
