"""`python -m starflow2_jax`: the same as `starflow2`."""

import sys

from starflow2_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
