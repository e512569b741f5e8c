"""The way of packets of established flows: TUN and UDP, through the shared tables, into and out of rings."""

import os

# Importing numpy starts a thread for each further core, for linear algebra that nothing here does; a process
# that forks may have none, so whatever the environment says does not count. Each name is that of one library
# that numpy may have been built with, which reads it once, when numpy is loaded. Nothing but modules of this
# package loads numpy.
for _library in ("OPENBLAS", "OMP", "MKL", "BLIS"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"
