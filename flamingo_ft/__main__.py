"""`python -m flamingo_ft` is the command `flamingo-ft`."""

import sys

from flamingo_ft.cli import main

sys.exit(main())
