"""``python -m apb_jax`` is ``python -m apb_jax.run``."""

import sys

from apb_jax.run import main

if __name__ == "__main__":
    sys.exit(main())
