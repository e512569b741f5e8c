"""`python -m tools.iperf_harness`."""

import sys

from tools.iperf_harness.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
