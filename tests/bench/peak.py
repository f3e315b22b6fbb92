"""Run a program and write the peak of its resident memory in bytes: python peak.py OUT PROGRAM ...

A process inherits its parent's peak when it is started, so this one must be small: it imports nothing.
"""

import os
import sys

process = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(process, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)))
sys.exit(os.waitstatus_to_exitcode(status))
