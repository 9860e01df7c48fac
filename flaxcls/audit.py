"""Audits data by a cross-validation: wrong labels, near-duplicates, outliers, confused classes.

    python -m flaxcls.audit --run=DIR [--out=DIR]

DIR is the folder of `python -m flaxcls.crossval`. Writes tables, a page with the pictures, and
corrected.csv, on which --config.data.name=list --config.data.path=corrected.csv trains.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, write_result

FLAGS = flags.FlagValues()
flags.DEFINE_string("run", None, "The folder of the cross-validation.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "Where to write; DIR/audit if not given.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.run is None:
        raise ConfigError("--run=DIR is missing; it is the folder of python -m flaxcls.crossval")

    from flaxcls.insight.audit import audit
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    out = cli.folder("out", FLAGS.out) if FLAGS.out else None
    found = audit(cli.folder("run", FLAGS.run), out)
    write_result(
        f"{found['examples']:,} examples: {found['label_issues']:,} labels are probably wrong, in "
        f"{found['confused']:,} pairs of classes; {found['duplicates']:,} pictures are nearly "
        f"one to evaluate on\nThe audit is in {printable(found['out'])}: index.html, corrected.csv"
    )


if __name__ == "__main__":
    cli.run(main)
