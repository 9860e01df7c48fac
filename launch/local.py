"""Runs a training as several processes on this machine, as a pod or a cluster would.

    python -m launch.local -n 2 [--heartbeat_timeout=60] -- --config=FILE --workdir=DIR

DIR may be in a bucket, gs://... or s3://...

Process 0 speaks for all; what the others say on standard error is marked with their number.
SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C are passed on to all of them, as SIGTERM. The exit code is that
of the first process that failed; the others then have the heartbeat's time to end by themselves.
"""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 20  # seconds after the heartbeat's time that a process has to end before it is killed


def main() -> int:
    arguments = _parse()
    address = f"127.0.0.1:{_free_port()}"
    processes = [_start(number, address, arguments) for number in range(arguments.processes)]
    listeners = [
        threading.Thread(target=_pass_on, args=(number, process), daemon=True)
        for number, process in enumerate(processes)
    ]
    for listener in listeners:
        listener.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        # Ctrl-C too: for several processes there is one way to end, and it saves.
        signal.signal(number, lambda *_: _send(processes, signal.SIGTERM))

    code = _wait(processes, arguments.heartbeat_timeout + GRACE)
    for listener in listeners:
        listener.join()
    return code


def _parse() -> argparse.Namespace:
    usage, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{usage}\n\n{rest}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--processes", type=int, default=2, help="how many (2)")
    parser.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=60,
        help="seconds after which a silent process is taken for dead (60)",
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="-- and the arguments of flaxcls.main"
    )
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"-n must be at least 1, got {arguments.processes}")
    if arguments.arguments[:1] == ["--"]:
        del arguments.arguments[0]
    if not arguments.arguments:
        parser.error("the arguments of flaxcls.main are missing, after --")
    return arguments


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(number: int, address: str, arguments: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-m", "flaxcls.main", *arguments.arguments]
    command += [f"--coordinator_address={address}", f"--num_processes={arguments.processes}"]
    command += [f"--process_id={number}", f"--heartbeat_timeout={arguments.heartbeat_timeout}"]
    # In sessions of their own: a terminal's Ctrl-C comes from here, not from the terminal as well.
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def _pass_on(number: int, process: subprocess.Popen) -> None:
    mark = f"[{number}] ".encode() if number else b""
    for line in process.stderr:
        sys.stderr.buffer.write(mark + line)
        sys.stderr.flush()


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _wait(processes: list[subprocess.Popen], patience: float) -> int:
    """The code of the first that failed, or 0; signals count as the shell has them, 128 more."""
    code, failed_at = 0, None
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        failed = [p.returncode for p in processes if p.returncode not in (None, 0)]
        if failed and failed_at is None:
            code, failed_at = failed[0], time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > patience:
            _send(processes, signal.SIGKILL)
    failed = [process.returncode for process in processes if process.returncode]
    code = code or (failed[0] if failed else 0)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
