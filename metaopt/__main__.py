"""``python -m metaopt`` is the command ``metaopt``."""

import sys

from metaopt.cli import main

sys.exit(main())
