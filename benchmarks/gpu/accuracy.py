"""Trains a recipe of CIFAR-10 by its documented command: seconds to an accuracy on this device."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    run = Path(tempfile.mkdtemp()) / "run"
    command = [
        *(sys.executable, "-m", "flaxcls.main", f"--config=configs/{options.recipe}.py"),
        *(f"--workdir={run}", f"--config.data.dir={options.data}", f"--config.seed={options.seed}"),
        *(["--config.duration=2 steps", "--config.eval.every=2 steps"] if options.tiny else []),
    ]
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        return code
    summary = json.loads((run / "summary.json").read_text())
    result = {
        "seconds": time.perf_counter() - start,
        "accuracy": summary["eval"]["accuracy"],
        "images_per_second": summary["images_per_second"],
        "data_wait": summary["data_wait"],
        "goodput": json.loads((run / "goodput.json").read_text()),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
