"""Whole runs, inside this process: the run's folder, intervals, restarts."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import augment, build
from flaxcls.config.durations import Duration
from flaxcls.errors import ConfigError, DataError, DivergedError, Interrupted
from flaxcls.runs import checkpoint_reader, manifest
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.metric_log import MetricLog
from flaxcls.runtime import sharding
from flaxcls.training import due
from flaxcls.training.due import Due
from flaxcls.training.program import Program
from flaxcls.training.train import train_config as train


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config, folder and summary of a finished run with an average of the parameters."""
    from flaxcls.config import default

    config = default()
    config.batch_size, config.duration, config.log_every = 16, "12 steps", "3 steps"
    config.eval.every, config.checkpoint.every = "6 steps", "4 steps"
    config.checkpoint.best_metric, config.checkpoint.keep = "loss", 3
    config.data.name, config.data.image_shape, config.data.num_classes = "fake", (8, 8, 1), 11
    config.data.num_examples = 96
    config.ema_decay = 0.9
    config.model.name = "dense"
    config.model.widths = (16,)
    workdir = tmp_path_factory.mktemp("train") / "run"
    return config, workdir, train(config, workdir)


def test_summary_says_how_it_ended(finished):
    _, workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["step"] == 12 and summary["finished"]
    assert summary["seconds"] > 0 and summary["images_per_second"] > 0
    assert 0 <= summary["data_wait"] <= 1
    for name in ("eval", "ema"):
        assert summary[name].keys() == {"accuracy", "accuracy_top5", "loss", "count"}
        assert summary[name]["count"] == 24
    assert summary["best"].keys() == {
        "step",
        "weights",
        "accuracy",
        "accuracy_top5",
        "loss",
        "count",
    }


def test_config_file_says_what_made_the_run(finished):
    config, workdir, _ = finished
    content = json.loads((workdir / "config.json").read_text())
    assert content["config"]["model"]["widths"] == [16]
    assert content["config"]["data"]["name"] == config.data.name
    assert content["versions"]["jax"] == jax.__version__ and content["versions"]["python"]
    assert content["device"] == {"kind": jax.devices()[0].device_kind, "count": 8}
    assert content["class_names"] == [f"class_{i}" for i in range(11)]
    assert len(content["mean"]) == len(content["std"]) == 1 and 0 < content["mean"][0] < 1
    assert content["image_shape"] == [8, 8, 1] and len(content["fingerprint"]) == 16
    assert "commit" in content


def test_rows_come_at_their_steps(finished):
    _, workdir, summary = finished
    rows = rows_of(workdir)
    assert [row["step"] for row in rows if "train" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if "eval" in row] == [6, 12]
    row = rows[0]
    assert row["epoch"] == 0.5
    assert {"loss", "accuracy", "accuracy_top5", "learning_rate", "grad_norm"} <= row[
        "train"
    ].keys()
    assert all(math.isfinite(value) for value in row["train"].values())
    assert rows[-1]["eval"] == summary["eval"] and rows[-1]["ema"] == summary["ema"]
    losses = {
        (row["step"], name): row[name]["loss"]
        for row in rows
        for name in ("eval", "ema")
        if name in row
    }
    best = min(losses, key=losses.get)
    assert best == (summary["best"]["step"], summary["best"]["weights"])
    assert losses[best] == summary["best"]["loss"]


def test_checkpoint_is_self_sufficient(finished):
    config, workdir, summary = finished
    checkpoints = Checkpoints(workdir / "checkpoints")
    facts = checkpoints.metadata(12)
    checkpoints.close()
    assert facts["config"]["model"]["name"] == config.model.name
    assert facts["class_names"] == [f"class_{i}" for i in range(11)]
    assert len(facts["mean"]) == len(facts["std"]) == 1
    assert facts["progress"]["best"] == summary["best"]
    assert facts["fingerprint"]


def test_lost_summary_is_written_again_without_training(finished, tmp_path):
    config, workdir, summary = finished
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "summary.json").unlink()
    before = (copy / "metrics.jsonl").read_bytes()
    again = train(config, copy)
    assert {k: again[k] for k in ("step", "eval", "ema", "best")} == {
        k: summary[k] for k in ("step", "eval", "ema", "best")
    }
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_newest_checkpoints_and_the_best_are_kept(tiny_config, tmp_path):
    # Learning backwards, from the second evaluation on.
    config = tiny_config(
        duration="20 steps",
        eval__every="2 steps",
        checkpoint__every="2 steps",
        checkpoint__keep=2,
        checkpoint__best_metric="loss",
        schedule__name="constant",
        schedule__warmup="12 steps",
        optimizer__learning_rate=20.0,
        optimizer__gradient_clip_norm=1.0,
    )
    summary = train(config, tmp_path / "run")
    best = summary["best"]["step"]
    assert best < 18, "the test needs a best result in the past"
    assert saved_steps(tmp_path / "run") == [best, 18, 20]


def test_best_result_is_saved_even_between_the_intervals(tiny_config, tmp_path):
    train(tiny_config(checkpoint__every="1000 seconds", eval__every="6 steps"), tmp_path / "run")
    first = rows_of(tmp_path / "run")[2]
    assert first["step"] == 6 and "eval" in first
    assert set(saved_steps(tmp_path / "run")) <= {6, 12} and 12 in saved_steps(tmp_path / "run")


def test_intervals_by_steps_and_by_time(monkeypatch):
    by_steps = Due(Duration(2.5, "steps"), total_steps=11)
    assert [step for step in range(1, 12) if by_steps(step)] == [3, 5, 8, 10, 11]
    now = [100.0]
    monkeypatch.setattr(due.time, "monotonic", lambda: now[0])
    by_time, said = Due(Duration(60, "seconds"), total_steps=10), []
    for step in range(1, 11):
        now[0] += 25
        if by_time(step):
            said.append(step)
    assert said == [3, 6, 9, 10]


def test_time_based_checkpoints_are_saved_while_training(tiny_config, tmp_path):
    config = tiny_config(
        duration="30 steps",
        checkpoint__every="0.001 minutes",
        checkpoint__keep=100,
        eval__every="100%",
    )
    with pytest.raises(ConfigError, match="config.checkpoint.every must be at least"):
        train(config, tmp_path / "run")
    config.checkpoint.every = "1 seconds"
    train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run")[-1] == 30


def test_other_seed_or_model_is_refused_for_a_run(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.seed = 9
    with pytest.raises(ConfigError, match="config.seed = 0, got 9; give another --workdir"):
        train(other, workdir)
    free = config.copy_and_resolve_references()
    free.checkpoint.every, free.data.dir = "1 minutes", "/elsewhere"
    assert train(free, workdir)["finished"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_signal_saves_and_the_run_goes_on_bitwise(
    tiny_config, tmp_path, monkeypatch, saved_arrays, assert_same_arrays, number, code
):
    config = tiny_config(ema_decay=0.9, checkpoint__every="100%")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    train(config, tmp_path / "whole")
    update, calls = Program.update, []

    def update_and_signal(self, state, batch):
        calls.append(number)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return update(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "update", update_and_signal)
        with pytest.raises(Interrupted, match="stopped after step 5 of 12 and saved") as stopped:
            train(config, tmp_path / "stopped")
    assert stopped.value.exit_code == code
    assert saved_steps(tmp_path / "stopped") == [5]
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    train(config, tmp_path / "stopped")
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    arrays = [saved_arrays(tmp_path / name, 12) for name in ("whole", "stopped")]
    assert_same_arrays(*arrays)


def test_checkpoint_whose_rows_a_full_disk_has_no_room_for_is_not_saved(
    tiny_config, tmp_path, monkeypatch, capfd
):
    flush = MetricLog.flush
    written = {4: False, 8: True, 12: False}  # the last one is saved in any case
    rows = {"steps": 0}

    def without_room(self):
        flush(self)
        return written.get(rows["steps"], True)

    def stepped(self, step, epoch):
        rows["steps"] = step

    monkeypatch.setattr(MetricLog, "flush", without_room)
    monkeypatch.setattr(MetricLog, "stepped", stepped)
    train(tiny_config(log_every="4 steps", eval__every="100%"), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [8, 12]
    assert "step 4 not saved: its rows of metrics.jsonl can't be" in capfd.readouterr().out


def diverging(tiny_config, **changes):
    """Every update is far too large from the beginning."""
    return tiny_config(
        **{"divergence__max_grad_norm": 1e-9, "divergence__max_skipped": 3, "log_every": "1 steps"}
        | changes
    )


def test_run_that_diverges_again_and_again_ends_and_says_what_is_good(tiny_config, tmp_path):
    message = (
        "steps [0-9]+ to [0-9]+ were not finite or too large, after 3 rollbacks within 1 updates; "
        "the checkpoint of step [0-9]+ is good; a lower config.optimizer.learning_rate"
    )  # though it makes steps, which are all skipped, it makes no update
    with pytest.raises(DivergedError, match=message):
        train(diverging(tiny_config, checkpoint__every="1 steps"), tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()


def test_run_that_diverges_before_it_was_saved_begins_anew(tiny_config, tmp_path):
    config = diverging(tiny_config, checkpoint__every="100%", divergence__max_rollbacks=1)
    with pytest.raises(
        DivergedError, match="steps 1 to 3 .*, after 1 rollback .*; nothing is saved"
    ):
        train(config, tmp_path / "run")


@pytest.fixture
def poison(monkeypatch):
    """Makes the images of chosen examples NaN, as the network sees them."""
    build = augment.build

    def choose(condition):
        def poisoned(*arguments, **options):
            augmentation = build(*arguments, **options)

            def apply(key, batch):
                bad = condition(batch)[:, None, None, None]
                batch = augmentation(key, batch)
                return {**batch, "image": jnp.where(bad, jnp.nan, batch["image"])}

            return apply

        monkeypatch.setattr(augment, "build", poisoned)

    return choose


def test_update_that_is_not_finite_is_left_out_and_counted(tiny_config, tmp_path, poison):
    poison(lambda batch: (batch["index"] == 5) & (batch["epoch"] == 0))
    summary = train(tiny_config(ema_decay=0.9), tmp_path / "run")
    rows = [row["train"] for row in rows_of(tmp_path / "run") if "train" in row]
    assert sum(row["skipped_updates"] for row in rows) == 1
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert summary["rollbacks"] == 0 and math.isfinite(summary["ema"]["loss"])


def test_run_goes_back_and_on_with_other_data_and_ends_well(
    tiny_config, tmp_path, poison, saved_arrays, assert_same_arrays
):
    poison(lambda batch: batch["epoch"] == 1)  # the batches 7 to 12 of the order
    config = tiny_config(
        log_every="1 steps",
        checkpoint__every="2 steps",
        checkpoint__keep=10,
        divergence__max_skipped=3,
    )
    summary = train(config, tmp_path / "run")
    assert summary["rollbacks"] == 2
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "train" in row] == list(range(1, 13))
    for name, array in saved_arrays(tmp_path / "run", 12).items():
        assert np.isfinite(array).all(), name

    # Stopped at any moment, it ends in the same way: the rollback is made again.
    steps = saved_steps(tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run", other)
    (other / "summary.json").unlink()
    for step in steps:
        if step > 4:
            shutil.rmtree(other / "checkpoints" / str(step))
    again = train(config, other)
    assert again["rollbacks"] == 2 and again["eval"] == summary["eval"]
    assert (other / "metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()
    assert_same_arrays(saved_arrays(other, 12), saved_arrays(tmp_path / "run", 12))


def test_rollbacks_count_within_so_many_updates_also_after_a_restart(
    tiny_config, tmp_path, poison, saved_arrays, assert_same_arrays
):
    # Two stretches of 6 batches, each of which costs one rollback, some 20 updates apart.
    poison(lambda batch: batch["epoch"] % 4 == 1)

    def config(within):
        return tiny_config(
            duration="40 steps",
            log_every="2 steps",
            eval__every="20 steps",
            checkpoint__every="5 steps",
            divergence__max_skipped=6,
            divergence__max_rollbacks=1,
            divergence__within=within,
        )

    rate, few = tmp_path / "rate", tmp_path / "few"
    assert train(config("15 steps"), rate)["rollbacks"] == 2

    for _ in range(2):  # the second time from a checkpoint that knows of the first rollback
        with pytest.raises(DivergedError, match="after 1 rollback within 40 updates; the"):
            train(config("100%"), few)
    assert train(config("15 steps"), few)["rollbacks"] == 2  # it resumes, and ends the same
    assert_same_arrays(saved_arrays(rate, 40), saved_arrays(few, 40))


def test_rollbacks_before_they_were_dated_still_count(tiny_config, tmp_path, poison):
    poison(lambda batch: batch["epoch"] == 1)
    changes = {"log_every": "1 steps", "checkpoint__every": "2 steps", "divergence__max_skipped": 6}
    run, config = tmp_path / "run", tiny_config(duration="20 steps", **changes)
    assert train(config, run)["rollbacks"] == 1
    (run / "summary.json").unlink()
    for facts in run.glob("checkpoints/*/facts/metadata"):
        metadata = json.loads(facts.read_text())
        del metadata["progress"]["diverged_at"]
        facts.write_text(json.dumps(metadata))
        manifest.write(facts.parents[1], checkpoint_reader.WRITTEN_LAST)
    shutil.rmtree(run / "checkpoints/20")
    poison(lambda batch: batch["epoch"] >= 0)
    for field, value in (("max_rollbacks", 1), ("max_skipped", 2)):
        config.divergence[field] = value
    with pytest.raises(DivergedError, match="after 1 rollback within 2 updates"):
        train(config, run)


def test_balanced_class_weights_are_kept_for_the_evaluation(tiny_config, tmp_path):
    config = tiny_config(loss__class_weights="balanced", data__train_split="train[:43]")
    train(config, tmp_path / "run")
    counts = np.bincount(np.arange(43) % 5, minlength=5)
    content = json.loads((tmp_path / "run/config.json").read_text())
    np.testing.assert_allclose(content["class_weights"], 43 / (5 * counts))


def test_run_does_not_go_on_with_other_data(tiny_config, tmp_path, monkeypatch):
    config = tiny_config()
    train(config, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    monkeypatch.setattr("flaxcls.data.fake.fingerprint", lambda **facts: "0" * 16)
    with pytest.raises(DataError, match="the training data are not those"):
        train(config, tmp_path / "run")


def test_logged_learning_rate_waits_with_the_schedule_while_updates_are_skipped(tiny_config):
    mesh = sharding.make_mesh()
    for max_grad_norm, made in ((1e9, 4), (1e-9, 0)):
        config = tiny_config(divergence__max_grad_norm=max_grad_norm)
        program = Program.open(build.make_experiment(config, mesh))
        state = program.init()
        for step in range(4):
            state = program.update(state, program.batch(step))
        assert int(state.step) == 4
        assert program.last_learning_rate(state) == program.learning_rate(max(made - 1, 0))


def test_evaluation_tells_the_likelihood_and_the_objective_if_it_is_another(tmp_path, tiny_config):
    plain = train(tiny_config(), tmp_path / "plain")["eval"]
    assert "objective" not in plain
    smoothed = train(tiny_config(loss__label_smoothing=0.3), tmp_path / "smoothed")["eval"]
    assert smoothed["objective"] > smoothed["loss"] + 0.05  # what can't be reached is not counted


def documented(heading):
    """The names in backticks in a section of docs/run_folder.md."""
    text = (Path(__file__).parents[1] / "docs/run_folder.md").read_text()
    sections = {part.partition("\n")[0].strip("# "): part for part in text.split("\n## ")}
    return set(re.findall(r"`(\w+)`", sections[heading]))


def test_what_a_run_leaves_is_documented(tmp_path, tiny_config):
    config = tiny_config(
        ema_decay=0.9, loss__label_smoothing=0.1, data__num_classes=12, duration="6 steps"
    )
    summary = train(config, tmp_path)
    rows = rows_of(tmp_path)
    fields = {name for row in rows for name in row}
    fields |= {
        name for row in rows for group in row.values() if isinstance(group, dict) for name in group
    }
    assert fields | {"null"} == documented("metrics.jsonl")
    best = set(summary["best"]) - set(summary["eval"])
    assert {*summary, *best} == documented("summary.json")
    spent = json.loads((tmp_path / "goodput.json").read_text())
    assert {*spent, *spent["seconds"], *spent["start"]} == documented("goodput.json")
    written = {path.name for path in tmp_path.iterdir()} | {
        *json.loads((tmp_path / "config.json").read_text())
    }
    text = (Path(__file__).parents[1] / "docs/run_folder.md").read_text()
    assert not [name for name in written - {"config"} if f"`{name}" not in text]
