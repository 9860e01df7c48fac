"""Large arrays of the host in huge pages, where Linux gives them only to who asks."""

import contextlib
import os
import sys
from pathlib import Path

from flaxcls.runtime import output

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"  # since glibc 2.35; others take no notice of it
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts this command anew, in the same process, with malloc asking for huge pages.

    Every step of XLA:CPU takes its memory from malloc and gives it back, hundreds of MB, so that
    the kernel clears it page by page: 27,000 pages of 4 KiB in a step of 60 ms (`cifar10_convnet`).
    In pages of 2 MiB steps of `cifar10_convnet` take 0.67 of the time, of `_resnet20` 0.85 and of
    `_quick` 0.9, with as much memory at the peak (2 cores of an AMD EPYC, jax 0.10.2). malloc reads
    this when a process starts and at no other time, hence the new start, of 0.1 s.

    Does nothing where the kernel always or never gives huge pages, where the variable says what to
    do already, and in a process that has begun to work: one with JAX, or whose program can't be
    read again.
    """
    chosen = os.environ.get(_VARIABLE, "")
    if _TUNABLE in chosen or not _gives_on_request() or "jax" in sys.modules:
        return
    if sys.argv[0] in ("", "-") or sys.gettrace() or not sys.executable:
        return
    os.environ[_VARIABLE] = ":".join(filter(None, (chosen, f"{_TUNABLE}=1")))
    output.flush()
    with contextlib.suppress(OSError):  # then as it is: slower
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _gives_on_request() -> bool:
    try:
        return "[madvise]" in _SETTING.read_text()
    except OSError:  # another system, or a container that hides it
        return False
