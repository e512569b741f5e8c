"""`python -m nebula_mp` is the same as the command `nebula-mp`.

Data flow: python -m -> [__main__] -> cli.main
"""

import sys

from nebula_mp.cli import main

if __name__ == "__main__":
    sys.exit(main())
