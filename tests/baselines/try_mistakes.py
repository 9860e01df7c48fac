"""Makes some mistakes that users make, with real commands, and prints a table of what is said.

    python tests/baselines/try_mistakes.py [--only=WORD] > docs/mistakes.md

Each should end soon with one sentence that names what is wrong, and with the exit code of its kind:
2 config or usage, 45 data. Takes some five minutes on two cores.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {  # files with mistakes in them, or none
    "tiny.py": (
        "from flaxcls.config import default\n\n\ndef get_config():\n    config = default()\n"
        "    config.batch_size = 16\n    config.duration = '2 steps'\n"
        "    config.data.train_split = 'train[:64]'\n    config.data.eval_split = 'test[:32]'\n"
        "    config.model.name = 'dense'\n    config.model.widths = (8,)\n    return config\n"
    ),
    "syntax.py": "def get_config(:\n    pass\n",
    "imports.py": "import nosuchpackage\n\n\ndef get_config():\n    pass\n",
    "empty.py": "",
    "returns_dict.py": "def get_config():\n    return {'batch_size': 3}\n",
    "typo.py": (
        "from flaxcls.config import default\n\n\ndef get_config():\n    config = default()\n"
        "    config.optimizer.learning_rat = 0.1\n    return config\n"
    ),
    "raises.py": "def get_config():\n    return 1 / 0\n",
    "argument.py": "def get_config(kind):\n    return kind\n",
    "exits.py": "import sys\n\nsys.exit(0)\n",
    "recursion.py": "def get_config():\n    return get_config()\n",
    "empty.csv": "",
    "latin.py": b"# caf\xe9\n",
}
MAIN = ("main", "--config=tiny.py")
# What somebody may have meant, and the command.
MISTAKES = {
    "recipe with a syntax error": ("main", "--config=syntax.py"),
    "recipe that imports what is not installed": ("main", "--config=imports.py"),
    "empty recipe": ("main", "--config=empty.py"),
    "recipe that returns a dict": ("main", "--config=returns_dict.py"),
    "misspelt field in a recipe": ("main", "--config=typo.py"),
    "recipe that raises": ("main", "--config=raises.py"),
    "recipe that wants an argument": ("main", "--config=argument.py"),
    "recipe that exits": ("main", "--config=exits.py"),
    "recipe that calls itself": ("main", "--config=recursion.py"),
    "recipe without a name": ("main", "--config="),
    "two recipes": ("main", "--config=tiny.py", "--config=nosuch.py"),
    "recipe that is a folder": ("main", "--config=flat"),
    "recipe that is not UTF-8": ("main", "--config=latin.py"),
    "recipe that is an image": ("main", "--config=picture.png"),
    "seed that is no number": (*MAIN, "--config.seed=abc"),
    "field given twice, the second time wrong": (*MAIN, "--config.seed=1", "--config.seed=x"),
    "name in another alphabet": (*MAIN, "--config.optimizer.name=\u0430\u0434\u0430\u043c"),
    "field in another alphabet": (*MAIN, "--config.gr\u00f6\u00dfe=3"),
    "infinite learning rate": (*MAIN, "--config.optimizer.learning_rate=1e999"),
    "hang_after beyond all clocks": (*MAIN, "--config.hang_after=1e300 hours"),
    "a million devices": (*MAIN, "--config.mesh.cpu_devices=1000000"),
    "images of a million pixels": (*MAIN, "--config.image_size=1000000"),
    "workdir that can't be written": (*MAIN, "--workdir=/proc/run"),
    "coordinator without its port": (
        *MAIN,
        "--coordinator_address=localhost",
        "--num_processes=2",
        "--process_id=0",
    ),
    "port that is no number": (
        *MAIN,
        "--coordinator_address=localhost:abc",
        "--num_processes=1",
        "--process_id=0",
    ),
    "list that is empty": (*MAIN, "--config.data.name=list", "--config.data.path=empty.csv"),
    "regular expression that is none": (*MAIN, "--config.optimizer.no_weight_decay=[a-"),
    "magnitude of 99": (*MAIN, "--config.augment=({'name': 'rand_augment', 'magnitude': 99},)"),
    "seed with a point": (*MAIN, "--config.seed=1.5"),
    "seed beyond 64 bits": (*MAIN, "--config.seed=99999999999999999999"),
    "batch size of a billion": (*MAIN, "--config.batch_size=1000000000"),
    "batch that accumulation doesn't divide": (*MAIN, "--config.gradient_accumulation=3"),
    "accumulation of zero": (*MAIN, "--config.gradient_accumulation=0"),
    "duration below zero": (*MAIN, "--config.duration=-1 epochs"),
    "duration in days": (*MAIN, "--config.duration=2 days"),
    "duration of infinity": (*MAIN, "--config.duration=inf epochs"),
    "duration without its number": (*MAIN, "--config.duration=epochs"),
    "ema that is text": (*MAIN, "--config.ema_decay=high"),
    "ema of NaN": (*MAIN, "--config.ema_decay=nan"),
    "hang_after in steps": (*MAIN, "--config.hang_after=5 steps"),
    "log_every of nothing": (*MAIN, "--config.log_every="),
    "data path for digits": (*MAIN, "--config.data.path=/tmp"),
    "slice beyond 100 %": (*MAIN, "--config.data.train_split=train[:120%]"),
    "empty slice": (*MAIN, "--config.data.train_split=train[50%:50%]"),
    "slice without its bracket": (*MAIN, "--config.data.train_split=train[:50%"),
    "one mean, three wanted": (*MAIN, "--config.data.mean=(0.5, 0.5)", "--config.data.std=(1, 1)"),
    "mean without std": (*MAIN, "--config.data.mean=(0.5,)"),
    "std of zero": (*MAIN, "--config.data.mean=(0.5,)", "--config.data.std=(0.0,)"),
    "image_size of zero": (*MAIN, "--config.image_size=0"),
    "image_size that is text": (*MAIN, "--config.image_size=big"),
    "image sizes that go back": (
        *MAIN,
        "--config.image_size=(('1 steps', 8), ('0 steps', 16))",
    ),
    "unknown crop": (*MAIN, "--config.image_size=8", "--config.crop.name=random_crop"),
    "crop option without a size": (*MAIN, "--config.crop.area=(0.1, 1)"),
    "crop area that is turned round": (
        *MAIN,
        "--config.image_size=8",
        "--config.crop.name=random_resized_crop",
        "--config.crop.area=(1.0, 0.1)",
    ),
    "random crop to evaluate": (
        *MAIN,
        "--config.image_size=8",
        "--config.eval.crop.name=random_resized_crop",
    ),
    "resident with random crops": (
        *MAIN,
        "--config.image_size=8",
        "--config.crop.name=random_resized_crop",
        "--config.input.mode=resident",
    ),
    "no decoding threads": (*MAIN, "--config.input.threads=0"),
    "more broken images than all": (*MAIN, "--config.input.max_broken=2"),
    "misspelt augmentation": (*MAIN, "--config.augment=({'name': 'filp'},)"),
    "augmentation that is a word": (*MAIN, "--config.augment=flip"),
    "option an augmentation lacks": (*MAIN, "--config.augment=({'name': 'flip', 'p': 0.5},)"),
    "padding below zero": (*MAIN, "--config.augment=({'name': 'pad_crop', 'padding': -1},)"),
    "mixup of alpha zero": (*MAIN, "--config.augment=({'name': 'mixup', 'alpha': 0},)"),
    "normalize twice": (
        *MAIN,
        "--config.augment=({'name': 'normalize'}, {'name': 'normalize'})",
    ),
    "model in capitals": (*MAIN, "--config.model.name=ResNet50"),
    "widths that are a number": (*MAIN, "--config.model.widths=8"),
    "widths below one": (*MAIN, "--config.model.widths=(0,)"),
    "unknown activation": (*MAIN, "--config.model.activation=swish"),
    "dtype that JAX has and we don't": (*MAIN, "--config.model.dtype=float16"),
    "network too deep for its images": (
        *MAIN,
        "--config.model.name=quick",
        "--config.model.widths=(8, 8, 8, 8)",
    ),
    "class weights below zero": (
        *MAIN,
        "--config.loss.class_weights=(1, 1, 1, 1, 1, 1, 1, 1, 1, -1)",
    ),
    "class weights that are text": (*MAIN, "--config.loss.class_weights=equal"),
    "optimizer in capitals": (*MAIN, "--config.optimizer.name=Adam"),
    "learning rate that is text": (*MAIN, "--config.optimizer.learning_rate=1e-3x"),
    "learning rate of NaN": (*MAIN, "--config.optimizer.learning_rate=nan"),
    "clipping to zero": (*MAIN, "--config.optimizer.gradient_clip_norm=0"),
    "weight decay of an unknown kind": (*MAIN, "--config.optimizer.weight_decay_mode=L2"),
    "one_cycle with a warm-up": (
        *MAIN,
        "--config.schedule.name=one_cycle",
        "--config.schedule.warmup=1 steps",
    ),
    "final share above one": (*MAIN, "--config.schedule.final=2"),
    "evaluation every nothing": (*MAIN, "--config.eval.every=0 epochs"),
    "best by top-5 of ten classes": (*MAIN, "--config.checkpoint.best_metric=accuracy_top5"),
    "checkpoints on errors as they come": (*MAIN, "--config.checkpoint.on_error=ignore"),
    "fsdp that doesn't divide the devices": (
        *MAIN,
        "--config.mesh.fsdp=3",
        "--config.mesh.cpu_devices=2",
    ),
    "section given a value": (*MAIN, "--config.optimizer=adam"),
    "field below a field": (*MAIN, "--config.batch_size.value=3"),
    "flag with one dash of two words": (*MAIN, "--work-dir=x"),
    "field without its value": (*MAIN, "--config.seed"),
    "workdir that is a file": (*MAIN, "--workdir=tiny.py"),
    "workdir in the cloud": (*MAIN, "--workdir=s3://bucket/run"),
    "workdir with other files": (*MAIN, "--workdir=."),
    "process number without the others": (*MAIN, "--process_id=0"),
    "folder recipe without its folder": ("main", "--config=folder"),
    "folder of pictures that is not there": (
        "main",
        "--config=folder",
        "--config.data.path=/no/such/folder",
    ),
    "folder of pictures without classes": (
        "main",
        "--config=folder",
        "--config.data.path=flat",
    ),
    "pictures in the cloud, misspelt": (
        "main",
        "--config=folder",
        "--config.data.path=s2://bucket/pets",
    ),
    "pictures in the cloud without credentials": (
        "main",
        "--config=folder",
        "--config.data.path=s3://bucket/pets",
    ),
    "evaluate a folder that is no run": ("evaluate", "--run=flat"),
    "evaluate a file": ("evaluate", "--run=tiny.py"),
    "evaluate an unknown split": ("evaluate", "--run=run", "--split=tset"),
    "evaluate a checkpoint that is not there": ("evaluate", "--run=run", "--checkpoint=17"),
    "evaluate a checkpoint that is a word": ("evaluate", "--run=run", "--checkpoint=newest"),
    "predict without pictures": ("predict", "--run=run"),
    "predict a file that is not there": ("predict", "--run=run", "nothing.jpg"),
    "predict a text": ("predict", "--run=run", "tiny.py"),
    "predict in an unknown format": ("predict", "--run=run", "--format=xml", "picture.png"),
    "predict the best zero": ("predict", "--run=run", "--topk=0", "picture.png"),
    "averages of a run without": ("predict", "--run=run", "--ema", "picture.png"),
    "features into a folder that is not there": (
        "predict",
        "--run=run",
        "--features=no/such/f.npz",
        "picture.png",
    ),
    "check nothing": ("data", "check"),
    "unknown data command": ("data", "chekc"),
    "prepare without a place": ("data", "prepare", "--source=flat"),
    "preview into a text": ("data", "preview", "--config=tiny.py", "--out=grid.txt"),
    "benchmark of nothing": ("bench", "step"),
}


def prepare(folder: Path) -> None:
    """The recipes, a picture, a folder of pictures without classes, and a run."""
    from PIL import Image

    for name, text in RECIPES.items():
        path = folder / name
        path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    Image.new("L", (8, 8)).save(folder / "picture.png")
    (folder / "flat").mkdir()
    Image.new("L", (8, 8)).save(folder / "flat" / "one.png")
    code, text, _ = run(folder, (*MAIN, "--workdir=run"))
    if code:
        sys.exit(text)


def run(folder: Path, command: tuple[str, ...]) -> tuple[int, str, float]:
    """Exit code, what was said on standard error (or output, if nothing), and the seconds."""
    module, *arguments = command
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", f"flaxcls.{module}", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    seconds = time.perf_counter() - began
    return result.returncode, result.stderr.strip() or result.stdout.strip(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a word of the mistakes to try")
    only = parser.parse_args().only
    import jax

    print(
        f"# Mistakes, and what is said of them\n\n{datetime.date.today():%d %B %Y}, by `python "
        "tests/baselines/try_mistakes.py`, on 2 cores of an AMD EPYC with jax "
        f"{jax.__version__}. `tiny.py` is a recipe of two steps on digits, `run` its run, `flat` a "
        "folder with a picture and no classes.\n\n"
        "| mistake | command | what is said | exit code | seconds |\n|---|---|---|---|---|"
    )
    odd = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for mistake, command in MISTAKES.items():
            if only not in mistake:
                continue
            code, said, seconds = run(folder, command)
            lines = said.replace(name, "DIR").replace(str(ROOT) + "/", "").splitlines() or [""]
            cells = (json.dumps(" ".join(command))[1:-1].replace("|", "\\|"), lines[-1])
            print(
                f"| {mistake} | `{cells[0]}` | {cells[1].replace('|', chr(92) + '|')} | {code} | "
                f"{seconds:.1f} |",
                flush=True,
            )
            if code not in (2, 45) or "Traceback" in said or len(lines) > 3:
                odd.append(mistake)
    if odd:
        print(f"not one sentence with exit code 2 or 45: {', '.join(odd)}", file=sys.stderr)
    sys.exit(bool(odd))


if __name__ == "__main__":
    main()
