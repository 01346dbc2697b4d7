"""The system call filter of the sandbox, as a classic BPF program for seccomp.

In: the machine (`platform.machine()`). Out: bytes of `struct sock_filter` records. Namespaces already take away the
network, the files and the other processes; the filter takes what they leave: looking into other processes, new
namespaces (and with them kernel interfaces that only a namespace's root can reach), memory that no limit counts,
sockets other than Unix ones (AF_VSOCK reaches the hypervisor from any namespace), and changes of limits or priority of
the harness.

Numbers are those of the kernel's syscall tables (arch/x86/entry/syscalls/syscall_64.tbl,
include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import errno
import struct

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data, little-endian low halves
_X32_BIT = 0x40000000
_NEW_NAMESPACE_FLAGS = 0x7E020080  # every CLONE_NEW*
_AF_UNIX = 1

# name: (x86_64, aarch64); -1 where the architecture lacks it
_REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "perf_event_open": (298, 241), "bpf": (321, 280),
    "userfaultfd": (323, 282), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "syslog": (103, 116),
    "acct": (163, 89), "quotactl": (179, 60), "personality": (135, 92), "fanotify_init": (300, 262),
    "modify_ldt": (154, -1), "iopl": (172, -1), "ioperm": (173, -1), "seccomp": (317, 277),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _PRLIMIT = (56, 220), (435, 435), (41, 198), (302, 261)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def filter_program(machine: str) -> bytes:
    """The filter for x86_64 or aarch64; RuntimeError for another machine, where the numbers are not known."""
    if machine not in _ARCHITECTURES:
        raise RuntimeError(f"the sandbox has no system call filter for {machine}; known: {', '.join(_ARCHITECTURES)}")
    column, architecture = _ARCHITECTURES[machine]
    refuse, absent = _record(_RETURN, _ERRNO | errno.EPERM), _record(_RETURN, _ERRNO | errno.ENOSYS)
    code = [
        _record(_LOAD, _ARCHITECTURE_AT),
        _record(_JUMP_EQUAL, architecture, 1, 0),
        _record(_RETURN, _KILL_PROCESS),
        _record(_LOAD, _NUMBER_AT),
    ]
    if machine == "x86_64":
        code += [_record(_JUMP_GREATER_EQUAL, _X32_BIT, 0, 1), refuse]
    for numbers in _REFUSED.values():
        if numbers[column] >= 0:
            code += [_record(_JUMP_EQUAL, numbers[column], 0, 1), refuse]
    # clone3 takes its flags in memory, where a filter cannot look; without it the C library uses clone
    code += [_record(_JUMP_EQUAL, _CLONE3[column], 0, 1), absent]
    first_argument = _record(_LOAD, _FIRST_ARGUMENT_AT)
    allow = _record(_RETURN, _ALLOW)
    code += [_record(_JUMP_EQUAL, _CLONE[column], 0, 4), first_argument]
    code += [_record(_JUMP_ANY_BIT, _NEW_NAMESPACE_FLAGS, 0, 1), refuse, allow]
    for number, wanted in ((_SOCKET[column], _AF_UNIX), (_PRLIMIT[column], 0)):  # 0: only its own limits
        code += [_record(_JUMP_EQUAL, number, 0, 4), first_argument, _record(_JUMP_EQUAL, wanted, 1, 0), refuse, allow]
    return b"".join([*code, allow])


def _record(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
