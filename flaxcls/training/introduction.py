"""What is said before training begins, after all processes have agreed on it."""

from collections.abc import Iterator

from flaxcls import models
from flaxcls.buckets import AnyPath
from flaxcls.build import Before, Experiment
from flaxcls.config.fields import changes
from flaxcls.errors import ConfigError
from flaxcls.runs import run_folder
from flaxcls.runtime import processes, sharding
from flaxcls.training.program import Program


def introduce(
    experiment: Experiment, program: Program, workdir: AnyPath, before: Before | None
) -> None:
    """Says what is going to be trained; ConfigError if the processes differ in it."""
    fingerprint = experiment.evaluation.source.fingerprint
    processes.check_same(run_folder.identity(program.metadata, fingerprint))
    processes.say(_describe(experiment, program))
    if processes.is_first():
        changed = run_folder.changed_data(workdir, experiment.train.source)
        for note in (*experiment.notes, *_changes(before, experiment), *changed):
            processes.say(f"note: {note}")


def _describe(experiment: Experiment, program: Program) -> str:
    train, test = experiment.train.source, experiment.evaluation.source
    length = experiment.length
    epochs = length.total_steps / length.steps_per_epoch
    parameters = models.parameter_count(program.shapes.params)
    tta = f", by {experiment.tta}'s views of each" if experiment.tta else ""
    return (
        f"data: {train.name}, {len(train):,} images to train on ({train.split}), {len(test):,} to "
        f"evaluate on ({test.split}{tta}), {len(train.class_names)} classes\n"
        f"input: {program.describe_input()}\n"
        f"model: {experiment.config['model']['name']}, {parameters:,} parameters\n"
        f"devices: {sharding.describe(experiment.mesh)}\n"
        f"optimizer: {experiment.parameter_groups}\n"
        f"length: {length.total_steps:,} steps of {length.batch_size} images, "
        f"{round(epochs, 2) if epochs >= 1 else epochs:.4g} epochs"
    )


def _changes(before: Before | None, experiment: Experiment) -> Iterator[str]:
    """What a resumed run does otherwise than until now."""
    if before:
        for field, (old, new) in changes(before.config, experiment.config).items():
            yield f"config.{field} was {old!r} until now, and is {new!r} from now on"


def check_new_length(before: Before, experiment: Experiment, step: int, workdir: AnyPath) -> None:
    """Says what becomes of the learning rate when a run is made longer after a step.

    ConfigError for a run that is made shorter than it is.
    """
    total = experiment.length.total_steps
    if before.total_steps == total:
        return
    if step >= total:  # also at the last step of a shorter run: it was not to be the last one
        raise ConfigError(
            f"the run in {workdir} has made {step:,} steps already, "
            f"{'more than' if step > total else 'as many as'} config.duration = "
            f"{experiment.config['duration']!r} asks for, {total:,}: it can be made longer, not "
            "shorter"
        )
    if step:
        processes.say(
            f"note: after step {step:,} the learning rate would have been "
            f"{float(before.learning_rate(step)):.3g} and is "
            f"{float(experiment.learning_rate(step)):.3g}: config.schedule now ends at step "
            f"{total:,}"
        )
