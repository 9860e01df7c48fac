"""What is checked of a config before anything slow happens."""

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from flaxcls.augment.views import VIEWS
from flaxcls.build import accepted, inputs, log_to
from flaxcls.config import default, options
from flaxcls.config.durations import parse_duration
from flaxcls.config.fields import fields
from flaxcls.config.tree import get
from flaxcls.errors import ConfigError

_MOST_HOURS = 10_000  # without a step; threads can't wait for any time
_MOST_CPU_DEVICES = 1024  # XLA makes a thread for each, and hangs before it has made a million


def check(config: ConfigDict) -> None:
    """Raises ConfigError for fields of a wrong type or value that nothing else looks at."""

    def require(field: str, condition: bool, what: str) -> None:
        if not condition:
            raise ConfigError(f"config.{field} must be {what}, got {get(config, field)!r}")

    for field, standard in fields(default()):
        if standard is not None:
            kind = type(standard)
            require(field, options.fits(get(config, field), kind), options.describe(kind))
    accepted.check(config)
    batch, parts = config.batch_size, config.gradient_accumulation
    require("seed", 0 <= config.seed < 2**64, "at least 0 and below 2**64")
    require(
        "data.fold_seed", 0 <= (config.data.fold_seed or 0) < 2**32, "at least 0 and below 2**32"
    )
    require("batch_size", batch >= 1, "at least 1")
    require(
        "gradient_accumulation",
        parts >= 1 and batch % max(parts, 1) == 0,
        f"a divisor of config.batch_size, {batch}",
    )
    group = config.model.get("batch_norm_group")
    require(
        "model.batch_norm_group",
        group in (None, "global")
        or (options.fits(group, options.Count) and batch // parts % group == 0),
        "'global' or a divisor of config.batch_size (divided by config.gradient_accumulation), "
        f"{batch // parts}",
    )
    log_to.names(config.log_to)
    if config.eval.tta is not None:
        options.look_up("config.eval.tta", config.eval.tta, VIEWS)
    ema = config.ema_decay
    require("ema_decay", ema is None or 0 <= ema < 1, "at least 0 and below 1")
    beta = config.loss.effective_number_beta
    require(
        "loss.effective_number_beta",
        beta is None or options.fits(beta, options.BelowOne),
        "at least 0 and below 1",
    )
    decay = config.finetune.layer_decay
    require("finetune.layer_decay", decay is None or 0 < decay <= 1, "above 0 and at most 1")
    for field in (
        "repeats",
        "steps_per_dispatch",
        "input.threads",
        "input.read_ahead",
        "input.max_pixels",
        "input.max_bytes",
        "eval.batch_size",
        "eval.image_size",
        "checkpoint.keep",
        "divergence.max_skipped",
        "mesh.fsdp",
        "mesh.model",
        "mesh.cpu_devices",
        "optimizer.learning_rate_batch",
    ):
        value = get(config, field)
        require(field, value is None or options.fits(value, options.Count), "at least 1")
    tail = config.data.long_tail
    require(
        "data.long_tail", tail is None or (options.fits(tail, float) and tail >= 1), "at least 1"
    )
    require("divergence.max_rollbacks", config.divergence.max_rollbacks >= 0, "at least 0")
    with about("hang_after"):
        hang_after = parse_duration(config.hang_after)
    require("hang_after", hang_after.unit == "seconds", "a time, such as '10 minutes'")
    require("hang_after", hang_after.value <= 3600 * _MOST_HOURS, f"at most {_MOST_HOURS} hours")
    devices = config.mesh.cpu_devices or 1
    require("mesh.cpu_devices", devices <= _MOST_CPU_DEVICES, f"at most {_MOST_CPU_DEVICES}")
    require("divergence.max_grad_norm", config.divergence.max_grad_norm > 0, "above 0")
    require("input.processes", (config.input.processes or 0) >= 0, "at least 0")
    require("input.max_broken", 0 <= config.input.max_broken <= 1, "at least 0 and at most 1")
    require(
        "augment",
        config.augment is None or isinstance(config.augment, (list, tuple)),
        "a list such as ({'name': 'flip'},)",
    )
    for field, choices in (
        ("sampling", tuple(inputs.SAMPLINGS)),
        ("input.mode", ("auto", "resident", "stream")),
        ("input.policies", ("auto", "host", "device")),
        ("checkpoint.best_metric", ("accuracy", "balanced_accuracy", "accuracy_top5", "loss")),
        ("checkpoint.on_error", ("continue", "stop")),
        ("model.dtype", ("auto", "float32", "bfloat16")),
    ):
        require(field, get(config, field) in choices, " or ".join(choices))


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Names the field in a ConfigError that does not."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith("config."):
            raise
        raise ConfigError(f"config.{field}: {error}") from error
