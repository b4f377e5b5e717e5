"""``python -m elips_torch`` is the command ``elips-torch``."""

import sys

from elips_torch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
