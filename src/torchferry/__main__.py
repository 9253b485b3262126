"""``python -m torchferry``."""

import sys

from torchferry.cli.main import main

sys.exit(main())
