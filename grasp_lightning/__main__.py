"""``python -m grasp_lightning``: the program, where its script is not at hand."""

import sys

from grasp_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
