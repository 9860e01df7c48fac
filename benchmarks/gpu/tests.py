"""Runs tests that need no data on the accelerator: `python benchmarks/gpu/tests.py PATHS`.

They were written for the CPU. On an accelerator float32 products may be less exact: JAX is asked
for full precision.
"""

import json
import os
import re
import subprocess
import sys


def main() -> int:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cuda,cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "6", "-m", "not slow", *sys.argv[1:]]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    print(process.stdout)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", process.stdout, re.MULTILINE)
    summary = re.findall(r"^=* ?(.*(?:passed|failed|error).*) in .*$", process.stdout, re.MULTILINE)
    print(json.dumps({"summary": "".join(summary[-1:]), "failed": failed}))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
