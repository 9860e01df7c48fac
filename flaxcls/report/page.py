"""The page: its sections in order, and the one self-contained file that they become.

A section is a function of what is known of a run, or of the folders of several runs that are
compared. It returns a Section or, where there is nothing to show, None. Another one is added to the
lists below.
"""

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from flaxcls.buckets import AnyPath, as_path
from flaxcls.errors import OutputError, one_line
from flaxcls.files import atomic_write
from flaxcls.report import (
    answer_sections,
    comparison_sections,
    robustness_sections,
    training_sections,
)
from flaxcls.report.blocks import Block, Section
from flaxcls.report.figures import share
from flaxcls.report.run_data import RunData, load_run
from flaxcls.report.run_files import RunFiles, number_in, read_run
from flaxcls.runs import run_folder
from flaxcls.runtime import processes
from flaxcls.runtime.output import printable, printable_lines

OF_A_RUN: Sequence[Callable[[RunData], Section | None]] = (
    training_sections.overview,
    training_sections.learning_curves,
    answer_sections.confusions,
    answer_sections.classes,
    answer_sections.calibration,
    answer_sections.mistakes,
    answer_sections.explanations,
    robustness_sections.robustness,
    training_sections.speed,
    training_sections.configuration,
    training_sections.environment,
)
OF_SEVERAL: Sequence[Callable[[Sequence[RunFiles]], Section | None]] = (
    comparison_sections.learning_curves,
    comparison_sections.speed,
    comparison_sections.config_differences,
    comparison_sections.environment,
)
MOST_SECONDS = 30  # of predictions at the end of a run
_HERE = Path(__file__).parent


def write_report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    data_dir: str | None = None,
    max_seconds: float | None = None,
) -> AnyPath:
    """Writes a page about a run, or one that compares several; returns its file.

    Args:
      runs: the folder of a run, or those of several.
      out: the file; None: report.html in the run's folder, comparison.html here for several.
      data_dir: where the data of a run is, if it has moved.
      max_seconds: how long predictions for the evaluation split of a run may take, see `load_run`.

    Raises ConfigError where there is no run, and OutputError where the page can't be written.
    """
    folders = run_folder.folders(runs)
    if len(folders) == 1:
        run = load_run(folders[0], data_dir=data_dir, max_seconds=max_seconds)
        sections = [make(run) for make in OF_A_RUN]
        title, lead = run.files.name, _lead(run.files)
        out = out or folders[0] / "report.html"
    else:
        files = [read_run(folder) for folder in folders]
        title, lead = f"{len(files)} runs", ", ".join(comparison_sections.names_of(files))
        out = out or "comparison.html"
        results = comparison_sections.results(files, as_path(out).parent)
        sections = [results, *(make(files) for make in OF_SEVERAL)]
    out = as_path(out, "--out=")
    text = render(title, lead, [section for section in sections if section])
    try:
        with atomic_write(out) as file:
            file.write(text.encode())
    except OSError as error:
        raise OutputError(f"{printable(out)} can't be written: {error.strerror}") from error
    return out


def report_at_the_end(runs: AnyPath | Sequence[AnyPath], out: AnyPath | None = None) -> str:
    """Writes the page of runs that have just ended, one in its process; never raises.

    Returns where it is or, in a sentence, why there is none. Devices of other processes can't be
    used any more, so that the page of several processes has no predictions.
    """
    try:
        is_one = not isinstance(runs, Sequence)
        seconds = MOST_SECONDS if is_one and processes.count() == 1 else 0
        return f"Report: {printable(write_report(runs, out, max_seconds=seconds))}"
    except Exception as error:  # whatever it is, the run has succeeded
        return f"There is no report: {one_line(error) or type(error).__name__}"


def _lead(run: RunFiles) -> str:
    """What was trained on what, in a sentence."""
    if not run.config:
        return f"A run that has come to step {run.last_step:,}."
    network, data = run.config["model"]["name"], run.config["data"]["name"]
    text = f"{network} on {data}, {run.config['duration']}"
    accuracy, of = (number_in(run.results, "eval", name) for name in ("accuracy", "count"))
    if accuracy is not None and of:
        split = run.config["data"]["eval_split"]
        text += f": {share(accuracy)} of the {of:,} images of '{split}' are right"
    return f"{text}."


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as HTML. It needs nothing besides itself, and a browser is told to fetch nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_one_way_to_print,
    )
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    macros = environment.get_template("blocks.html").module

    def show(block: Block) -> Markup:
        return getattr(macros, type(block).__name__.lower())(block)

    return environment.get_template("page.html").render(
        title=title,
        lead=lead,
        sections=sections,
        show=show,
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _one_way_to_print(value: object) -> object:
    """Names of files and classes as one sees them: no control characters, no turned direction."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable_lines(value)
    return value
