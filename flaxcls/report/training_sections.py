"""Sections on how a run was trained: its result, curves, speed, config and surroundings."""

import json
import time
from collections.abc import Iterator
from typing import Any

from flaxcls.config.fields import fields
from flaxcls.insight.intervals import wilson
from flaxcls.insight.scores import BINS, reliability
from flaxcls.report import svg
from flaxcls.report.blocks import (
    Block,
    Chart,
    Charts,
    Facts,
    Note,
    Number,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
)
from flaxcls.report.figures import curves, progress_axis, share, span
from flaxcls.report.run_data import RunData
from flaxcls.report.run_files import RunFiles, number_in, training_examples
from flaxcls.report.svg import Line
from flaxcls.runs.goodput import NAMES, STAGES
from flaxcls.runtime.output import printable

GROUPS = {"train": "training", "eval": "evaluation", "ema": "averaged parameters"}
STYLES = {"train": "c7 thin", "eval": "c0", "ema": "c1 dashed"}
_RECORDED = {  # of config.json
    "commit": "Commit of flaxcls",
    "fingerprint": "Fingerprint of the data",
    "mean": "Mean of the channels",
    "std": "Standard deviation",
}
_SPENT = {  # what seconds go to, in the order of the bar, and its colours
    "step": "c0",
    "data_wait": "c1",
    "evaluate": "c2",
    "save": "c6",
    "compile": "c3",
    "startup": "c5",
    "lost": "c4",
    "down": "c7",
}


def overview(run: RunData) -> Section:
    """What was trained on what, and how well."""
    files, answers = run.files, run.answers
    tiles = [*_result_tiles(files.results)]
    if answers:
        error = share(reliability(answers.judged).error)
        tiles.append(Tile("Calibration error", error, f"expected, {BINS} bins"))
    notes: list[Block] = [Note(problem) for problem in files.problems]
    if not files.summary.get("finished"):
        notes.append(Note(f"This run has not finished; it has come to step {files.last_step:,}."))
    if run.left_out:
        notes.append(Note(run.left_out))
    facts = [(name, text) for name, text in _facts(run) if text]
    return Section("Result", [*notes, Tiles([*tiles, *_cost_tiles(files)]), Facts(facts)])


def _result_tiles(results: dict[str, dict[str, Any]]) -> Iterator[Tile]:
    for name, row in results.items():
        accuracy, count = number_in(row, "accuracy"), number_in(row, "count")
        if accuracy is not None and count:
            low, high = wilson(round(accuracy * count), count)
            note = f"95 %: {100 * low:.2f} to {100 * high:.2f}; {count:,} images"
            label = "Accuracy" if name == "eval" else "Averaged parameters"
            yield Tile(label, share(accuracy), note)
    evaluated = results.get("eval")
    if (top5 := number_in(evaluated, "accuracy_top5")) is not None:
        yield Tile("Top-5 accuracy", share(top5))
    if (loss := number_in(evaluated, "loss")) is not None:
        yield Tile("Loss", f"{loss:.4f}", "negative log-likelihood")


def _cost_tiles(files: RunFiles) -> Iterator[Tile]:
    if (rate := number_in(files.summary, "images_per_second")) is not None:
        yield Tile("Throughput", f"{rate:,.0f}", "images/s in training")
    seconds = number_in(files.summary, "seconds")
    if seconds is None and isinstance(spent := files.goodput.get("seconds"), dict):
        seconds = sum(number_in(spent, name) or 0 for name in spent)
    if seconds is not None:
        yield Tile("Time", span(seconds), "restarts included")
    if (goodput := number_in(files.goodput, "goodput")) is not None:
        yield Tile("Goodput", f"{100 * goodput:.1f} %", "of the time was stepping")


def _facts(run: RunData) -> Iterator[tuple[str, str]]:
    files, answers, config = run.files, run.answers, run.files.config
    if config:
        data, evaluated = config["data"], number_in(files.results.get("eval"), "count")
        examples = training_examples(files)
        classes = files.record.get("class_names")
        yield "Data", _words(data["name"], path=data.get("path"), dir=data.get("dir"))
        yield "Trained on", _split(data["train_split"], examples)
        yield "Evaluated on", _split(data["eval_split"], evaluated)
        yield "Classes", f"{len(classes):,}" if isinstance(classes, list) else ""
        yield "Images", _shape(files.record.get("image_shape"))
        parameters = f"{answers.parameters:,} parameters" if answers else ""
        yield "Network", ", ".join(filter(None, [_options(config["model"]), parameters]))
        yield "Initial weights", config["init_from"] or ""
        yield "Augmentation", ", ".join(map(_options, config["augment"] or ()))
        yield "Loss", _options(config["loss"])
        yield "Optimizer", _options(config["optimizer"])
        yield "Schedule", _options(config["schedule"])
        yield "Length", f"{config['duration']}, batches of {config['batch_size']:,}"
    yield "Devices", devices(files.record)
    best = files.summary.get("best")
    if (accuracy := number_in(best, "accuracy")) is not None:
        averaged = ", averaged parameters" if best.get("weights") == "ema" else ""
        yield "Best", f"{share(accuracy)} after step {number_in(best, 'step') or 0:,}{averaged}"


def devices(record: dict[str, Any]) -> str:
    """`8 × NVIDIA H100`, by what config.json holds; "" where it doesn't say."""
    device = record.get("device")
    return f"{device.get('count')} × {device.get('kind')}" if isinstance(device, dict) else ""


def _split(name: str, count: float | None) -> str:
    return f"{name}, {count:,} images" if count else name


def _shape(shape: Any) -> str:
    return " × ".join(map(str, shape)) if isinstance(shape, list) else ""


def _words(name: str, **options: Any) -> str:
    given = [f"{key} {value}" for key, value in options.items() if value is not None]
    return ", ".join([name, *given])


def _options(section: dict[str, Any]) -> str:
    """`sgd, learning_rate 0.1, momentum 0.9`: a name and the options that say something."""
    options = {k: v for k, v in section.items() if k != "name" and v and v != "auto"}
    return _words(section["name"], **options) if section.get("name") else ""


def learning_curves(run: RunData) -> Section | None:
    """Loss, accuracy, learning rate and gradient norm over the steps."""
    files, x = run.files, progress_axis([run.files])

    def lines(metric: str, *groups: str) -> list[Line]:
        return [Line(GROUPS[g], STYLES[g], files.values(g, metric, x)) for g in groups]

    note = "In training: augmented images, and what is minimised"
    charts = [
        curves("Loss", lines("loss", *GROUPS), x, log=True, caption=note),
        curves("Accuracy", lines("accuracy", *GROUPS), x, percents=True),
        curves("Top-5 accuracy", lines("accuracy_top5", *GROUPS), x, percents=True),
        curves("Learning rate", lines("learning_rate", "train"), x, from_zero=True),
        curves(
            "Gradient norm", lines("grad_norm", "train"), x, log=True, caption="Before clipping"
        ),
    ]
    found = [chart for chart in charts if chart]
    if not found:
        return None
    return Section("Learning curves", [Charts(found), *map(Note, _incidents(files))])


def _incidents(files: RunFiles) -> Iterator[str]:
    for name, what in (("skipped_updates", "Skipped updates"), ("broken_images", "Broken images")):
        if total := sum(value for _, value in files.values("train", name)):
            yield f"{what}: {total:,.0f}."
    if rollbacks := number_in(files.summary, "rollbacks"):
        yield f"The run diverged and went back to a checkpoint: {rollbacks:,} ×."


def speed(run: RunData) -> Section | None:
    """Throughput over the steps and what the seconds went to, over all restarts."""
    files = run.files
    marks = files.starts[1:]
    note = f"Dashed: restarted or rolled back, {len(marks):,} ×" if marks else ""
    rate = Line("images/s", "c0", [(each.step, each.images_per_second) for each in files.speed])
    wait = Line("share of the time", "c1", [(each.step, each.data_wait) for each in files.speed])
    charts = [
        curves("Images/s", [rate], "step", from_zero=True, marks=marks, caption=note),
        curves("Waiting for data", [wait], "step", percents=True, from_zero=True, marks=marks),
    ]
    found = [chart for chart in charts if chart]
    blocks = [*([Charts(found)] if found else []), *_goodput(files)]
    return Section("Speed and goodput", blocks) if blocks else None


def _goodput(files: RunFiles) -> Iterator[Block]:
    """Where the seconds went, and how long the last start took."""
    numbers = files.goodput or files.summary.get("goodput")
    spent = {name: number_in(numbers, "seconds", name) or 0.0 for name in _SPENT}
    total = sum(spent.values())
    if total:
        restarts = int(number_in(numbers, "restarts") or 0)
        words = f"{restarts} restart{'s' * (restarts != 1)}"
        parts = [(style, NAMES[name], spent[name]) for name, style in _SPENT.items()]
        parts = [part for part in parts if part[2] >= 0.0005 * total]
        legend = [(style, f"{name} {100 * s / total:.1f} %") for style, name, s in parts]
        says = "; ".join(label for _, label in legend)
        bar = svg.stacked_bar(parts, f"Where the time went: {says}")
        yield Chart("Where the time went", bar, legend, f"{span(total)} in all, {words}")
    stages = {stage: number_in(numbers, "start", stage) for stage in STAGES}
    rows = [(stage.replace("_", " "), Number(s, f"{s:.2f}")) for stage, s in stages.items() if s]
    if rows:
        yield Table("The last start", ["came to", "after seconds"], rows, folded=True)


def configuration(run: RunData) -> Section | None:
    """The config: what differs from the default, what resumed runs changed, then all of it."""
    files = run.files
    if not files.config:
        return None
    changed = [(f, _json(new), _json(old)) for f, (old, new) in files.changed_fields.items()]
    everything = [(field, _json(value)) for field, value in fields(files.config)]
    differs = Table("What differs from the default", ["field", "value", "default"], changed)
    blocks: list[Block] = [differs if changed else Text("Everything is as it is by default.")]
    if resumed := list(_resumed(files.record.get("changes"))):
        head = ["when", "field", "before", "after"]
        blocks.append(Table("What resumed runs changed", head, resumed))
    blocks.append(Table("The whole config", ["field", "value"], everything, folded=True))
    return Section("Config", blocks)


def _resumed(recorded: Any) -> Iterator[tuple[str, str, str, str]]:
    for change in recorded if isinstance(recorded, list) else []:
        for field, (old, new) in change.get("fields", {}).items():
            yield change.get("time", ""), field, _json(old), _json(new)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def environment(run: RunData) -> Section | None:
    """What the result comes from: versions, devices, commit, and the fingerprint of the data."""
    files, record = run.files, run.files.record
    facts = [("Folder", printable(files.path))]
    facts.append(("Devices", devices(record)))
    facts += [(name, _recorded(record.get(key))) for key, name in _RECORDED.items()]
    alive = number_in(files.goodput, "last_sign_of_life")
    if alive:
        facts.append(("Last sign of life", time.strftime("%Y-%m-%d %H:%M", time.localtime(alive))))
    versions = record.get("versions")
    if isinstance(versions, dict):
        facts += [(name, str(version)) for name, version in versions.items()]
    return Section("Environment", [Facts([(name, text) for name, text in facts if text])])


def _recorded(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{n:.4f}" if isinstance(n, float) else str(n) for n in value)
    return str(value or "")
