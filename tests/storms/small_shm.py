"""`python -m train ARGUMENTS` with so many bytes of /dev/shm for its workers' batches: small_shm.py BYTES ARGUMENTS."""

import subprocess
import sys

from train.__main__ import run_as_program

NAMESPACE = "unshared"
if sys.argv[1] != NAMESPACE:  # the mount is this process's alone
    sys.exit(subprocess.call(["unshare", "--mount", sys.executable, __file__, NAMESPACE, *sys.argv[1:]]))
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}", "tmpfs", "/dev/shm"], check=True)
run_as_program(sys.argv[3:])
