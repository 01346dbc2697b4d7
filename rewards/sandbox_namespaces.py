"""Makes the sandbox's namespaces by system calls, for machines without bubblewrap.

In: `python -I -S sandbox_namespaces.py LAYOUT`, where LAYOUT is the JSON of `rewards.sandbox.Layout`. Out: this process
becomes the command of the layout, as process 1 of new user (unless root), mount, process, network, IPC and host name
namespaces, with a read-only root that holds only what the layout names. Exits with a message on standard error when the
kernel refuses.

The order follows pivot_root(2): a temporary root is made and entered so that every path of the host stays reachable
under /host while the final root is being filled; then that is left behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, PR_SET_PDEATHSIG = 2, 1
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442  # the same on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
DEVICES = ("null", "zero", "full", "random", "urandom")
NOBODY = 65534

_LIBC = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """struct mount_attr of the kernel."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace"))


def main() -> None:
    layout = json.loads(sys.argv[1])
    _check(_LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    os.setsid()
    if os.geteuid() != 0:
        _enter_user_namespace()
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _check(_LIBC.unshare(spaces), "unshare")
    child = os.fork()
    if child:  # stays so that whoever started us sees the sandbox end
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    _check(_LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    _check(_LIBC.sethostname(b"sandbox", 7), "sethostname")
    _build_root(layout)
    os.closerange(3, 1024)
    os.execve(layout["command"][0], layout["command"], layout["environment"])


def _enter_user_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(CLONE_NEWUSER), "unshare (user namespace)")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _build_root(layout: dict[str, Any]) -> None:
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV)
    os.mkdir("/tmp/host")
    os.mkdir("/tmp/root")
    _pivot_root("/tmp", "/tmp/host")
    _mount("tmpfs", "/root", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1M")
    for source, target in layout["binds"]:
        _bind("/host" + source, "/root" + target)
        _set_attributes("/root" + target, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, recursive=True)
    for target, path in layout["links"]:
        os.symlink(target, "/root" + path)
    os.mkdir("/root/dev")
    for name in DEVICES:
        _bind(f"/host/dev/{name}", f"/root/dev/{name}")
    for path in ("/dev/shm", "/tmp"):
        os.mkdir("/root" + path)
        size = f"mode=1777,size={layout['temporary_bytes']}"
        _mount("tmpfs", "/root" + path, "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.mkdir("/root/proc")
    _mount("proc", "/root/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir("/root")
    _pivot_root(".", ".")  # puts the old root on top of the new one, from where it is taken off
    _check(_LIBC.umount2(b".", MNT_DETACH), "umount")
    _set_attributes("/", MOUNT_ATTR_RDONLY, recursive=False)
    os.chdir("/tmp")


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, MS_BIND | MS_REC)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    code = _LIBC.mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data and data.encode()
    )
    _check(code, f"mount {target}")


def _set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    wanted = MountAttributes(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    code = _LIBC.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), ctypes.c_size_t(ctypes.sizeof(wanted))
    )
    _check(code, f"mount_setattr {path}")


def _pivot_root(new: str, old: str) -> None:
    number = SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        sys.exit(f"no system call numbers for {os.uname().machine}")
    _check(_LIBC.syscall(number, new.encode(), old.encode()), "pivot_root")


def _check(code: int, what: str) -> None:
    if code != 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
