"""XLA's choices of kernels on GPUs, kept with a run, so that it resumes with the same kernels.

While XLA compiles for a GPU it times kernels and takes the fastest, so a program that is compiled
twice may round differently. It can write down what it has chosen and, in another process, choose by
that: https://openxla.org/xla/persisted_autotuning
"""

import hashlib
import tempfile
from pathlib import Path

import jax
import jaxlib

from flaxcls.buckets import AnyPath
from flaxcls.errors import one_line
from flaxcls.runtime import compilation_cache, processes
from flaxcls.runtime.output import printable, say

WRITE, READ = "xla_gpu_dump_autotune_results_to", "xla_gpu_load_autotune_results_from"


class Autotuning:
    """What XLA chooses for the programs of a run, in a file; all processes make the same calls.

    A new run that gets a program from JAX's cache of compiled programs does not learn what was
    chosen for it: nothing is written, and it resumes with the same kernels as long as the cache has
    that program.

    Args:
      folder: of the run, the same one in all processes; what another version of XLA has chosen is
        kept beside, and not read.
      platform: what is compiled for, as the mesh has it; where it isn't "gpu" nothing is chosen.
    """

    def __init__(self, folder: AnyPath, platform: str):
        self._chooses = platform == "gpu"
        # XLA writes text because of the ending. The processes share what each has chosen.
        self._stored = folder / f"jaxlib-{jaxlib.__version__}.txt"
        self._path = self._stored if isinstance(folder, Path) else _copy_of(self._stored)
        self._known = self._chooses and bool(processes.agree(self._stored.exists()))
        if self._known and self._path != self._stored:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(self._stored.read_bytes())
        self._compiled = self._from_cache = 0  # programs

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """The compiled program, with the kernels in the file where there is one."""
        # The path is a part of what JAX's cache knows a program by. New runs have none, so that
        # they share programs; a resumed one gets none that another run has put there.
        options = {READ: str(self._path)} if self._known else None
        before = compilation_cache.hits()
        try:
            compiled = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            if not self._known:
                raise
            self._known = False
            processes.say(
                f"{printable(self._stored)} can't be used, so XLA chooses kernels anew, which may "
                f"round differently: {one_line(error)}"
            )
            return self.compile(lowered)
        self._compiled += 1
        self._from_cache += compilation_cache.hits() - before
        return compiled

    def write(self) -> None:
        """Writes the file, if anything has been chosen since it was read; says so if it can't."""
        anything = self._chooses and self._compiled > self._from_cache
        everything = self._known or not self._from_cache
        if not (anything and everything and processes.is_first()):
            return
        partial = self._path.with_suffix(".partial.txt")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with compilation_cache.unused():
                # Whichever program is compiled, XLA writes all that this process has chosen.
                jax.jit(lambda: 0).lower().compile({WRITE: str(partial)})
            partial.replace(self._path)
            if self._path != self._stored:
                self._stored.write_bytes(self._path.read_bytes())
        except (OSError, jax.errors.JaxRuntimeError) as error:
            say(
                f"flaxcls: {printable(self._stored)} can't be written, so a resumed run may round "
                f"differently: {one_line(error)}",
                error=True,
            )


def _copy_of(path: AnyPath) -> Path:
    """Where XLA finds what is in a bucket: always the same, as JAX's cache knows programs by it."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"flaxcls-autotuning-{digest}" / path.name
