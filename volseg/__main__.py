"""`python -m volseg` is the `volseg` command."""

import sys

from volseg.cli.main import main

sys.exit(main())
