"""`python -m tl_jets`."""

import sys

from tl_jets.cli import main

sys.exit(main())
