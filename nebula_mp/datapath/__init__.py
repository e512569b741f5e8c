"""The way of packets of established flows: TUN and UDP, through the shared tables, into and out of rings."""

import os

# Importing numpy starts a thread for each further core, for linear algebra that nothing here does; a process
# that forks may have none. Read once, by that import. Whoever wants the threads says so in the environment.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
