"""Settings of the process that a command runs in; the library leaves these to its callers."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
from pathlib import Path

import jax

from jaxaudit.provenance import cpu_flags, version_of

#: Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

#: Bytes of kept programs beyond which all are forgotten.
_MOST_KEPT = 1 << 28


def keep_freed_memory() -> None:
    """Tell glibc not to give freed arrays back to the system between blocks.

    The arrays of each window or block would be mapped anew, page by page: a third to a half of the time. One arena
    serves all threads: those of further ones are given back whenever they are empty.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        limit = ctypes.CDLL(None).mallopt
        limit(_TRIM_THRESHOLD, 1 << 30)
        limit(_MMAP_THRESHOLD, 1 << 25)
        limit(_ARENA_MAX, 1)


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder, for the next audit of a recording of this shape.

    A kept program passes the same self-test as a new one before it is used. JAX's own settings win:
    JAX_COMPILATION_CACHE_DIR for another folder, JAX_ENABLE_COMPILATION_CACHE=false for none. Where there is no
    folder to write to, nothing is kept.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"] or settings["jax_compilation_cache_dir"]:
        return
    with contextlib.suppress(
        OSError, RuntimeError, AttributeError
    ):  # a full disk, no home, no users
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if sum(file.stat().st_size for file in folder.iterdir()) > _MOST_KEPT:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        if folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK):
            return  # programs are executed: somebody else's are not
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _folder() -> Path:
    """Name a folder for programs of this processor: they are made of its instructions, and homes are shared."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = f"{platform.machine()} {cpu_flags()} {version_of('jaxlib')}"
    digest = hashlib.sha256(kind.encode()).hexdigest()
    return Path(base) / "jaxaudit" / f"programs-{digest[:16]}"
