"""Process 1 of a container that serves: starts tritonserver, passes signals on, and reaps dead processes.

    python3 -m deepseek_triton.ensemble.server.container tritonserver [ARGUMENT ...]

tritonserver gets these arguments, and the options that reserve its restricted APIs for who knows the administrator's
key: $TRITON_ADMIN_KEY, or a random one that nobody knows. The key stands on no command line. The exit status is
tritonserver's, 128 and more for a signal.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from deepseek_triton.ensemble.processes.hidden_arguments import HiddenArgumentsError, reveal
from deepseek_triton.ensemble.processes.launcher import PR_SET_PDEATHSIG, PTRACE_TRACEME
from deepseek_triton.ensemble.server.options import ADMIN_HEADER, ADMIN_KEY, restricting_options

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main(command: Sequence[str]) -> int:
    """Run `command` to its end."""
    options = restricting_options(ADMIN_HEADER, os.environ.get(ADMIN_KEY) or secrets.token_urlsafe(16))
    variables = {placeholder: f"HIDDEN_OPTION_{number}" for number, placeholder in enumerate(options)}
    environment = {name: value for name, value in os.environ.items() if name != ADMIN_KEY}
    secret = environment | {variables[placeholder]: option for placeholder, option in options.items()}
    wanted = [*command, *options]
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # one that comes now waits until it can be passed on
    child = start(wanted, secret, is_held=True)
    try:
        reveal(child, variables)
    except HiddenArgumentsError as error:
        # The placeholders close the APIs to everybody.
        print(f"the restricted APIs are closed to the administrator too: {error}", file=sys.stderr, flush=True)
        os.waitpid(child, 0)
        child = start(wanted, environment, is_held=False)

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def start(command: Sequence[str], environment: dict[str, str], is_held: bool) -> int:
    """Start `command`; returns its process id. It ends with this process, and if `is_held`, waits for `reveal`."""
    libc, parent = ctypes.CDLL(None), os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent and (not is_held or libc.ptrace(PTRACE_TRACEME, 0, None, None) == 0):
            os.execvpe(command[0], list(command), environment)
    except OSError as error:
        print(f"can't start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
