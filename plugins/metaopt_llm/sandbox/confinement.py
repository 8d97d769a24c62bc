"""What a process gives up before it runs a candidate. Linux only.

Three layers, each of which holds where the one above is missing:

- *limits*: another user than root, no environment, no open file but two pipes, and resource limits under which no file can be
  opened, no socket made, no process or thread started, no file written, and neither time nor memory run out for others;
- *namespaces*: no network, an empty root directory, and process numbers of its own, so that no other process has a name to be
  killed by and none that it started outlives it;
- *seccomp*: the kernel answers only the calls that arithmetic needs.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
from types import ModuleType

from metaopt_llm.sandbox.limits import Level, Limits

seccomp: ModuleType | None
try:
    seccomp = importlib.import_module("pyseccomp")
except (ImportError, OSError, RuntimeError):  # no package, or no libseccomp that it could load
    seccomp = None


_NOBODY = 65534
_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x00020000  # user, net, ipc, uts, mount
NEW_PROCESS_NUMBERS = 0x20000000
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38  # of prctl
_CAPABILITY_VERSION = 0x20080522

_SYSTEM_CALLS = (
    "read", "write", "close", "lseek", "fstat", "mmap", "munmap", "mprotect", "mremap", "brk", "madvise", "futex", "rseq",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "exit", "exit_group", "getpid",
    "gettid", "getrandom", "clock_gettime", "clock_nanosleep", "nanosleep", "gettimeofday", "sched_yield",
    "sched_getaffinity", "getcpu", "membarrier", "getrusage", "times", "sysinfo", "uname",
)  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def become_nobody() -> None:
    """Leave root, whom limits do not bind and who may signal and read everybody's processes."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def enter_namespaces() -> bool:
    """Leave the network, the mounts and, from the next child on, the process numbers of others; whether the kernel lets us."""
    return libc.unshare(_NEW_NAMESPACES | NEW_PROCESS_NUMBERS) == 0


def die_with_parent() -> None:
    """Be killed when the parent ends."""
    libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def confine(limits: Limits, empty: str | None) -> Level:
    """Give up what this process does not need, for good.

    Args:
        limits: of the resources.
        empty: in namespaces, a directory to be the root; else None.

    Returns:
        What was reached.
    """
    os.setsid()
    die_with_parent()
    os.environ.clear()
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    if empty is not None:
        os.chroot(empty)
        os.chdir("/")
    for kind, most in (
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_AS, own + (limits.megabytes << 20)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),  # no new ones; those that are open stay
    ):
        _, hard = resource.getrlimit(kind)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
    _drop_capabilities()
    libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up privileges")
    filtered = _filter_system_calls()
    return Level(2 * filtered + (empty is not None))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "cannot drop capabilities")


def _filter_system_calls() -> bool:
    if seccomp is None:
        return False
    try:
        allowed = seccomp.SyscallFilter(seccomp.ERRNO(1))  # EPERM
        for name in _SYSTEM_CALLS:
            allowed.add_rule(seccomp.ALLOW, name)
        allowed.load()
    except (OSError, RuntimeError):  # a kernel without seccomp, or a call that this machine has not
        return False
    return True
