"""`python -m tl_jets.cli`."""

import sys

from tl_jets.cli import main

sys.exit(main())
