"""Launcher of the program in a checkout; the program itself is ``grasp_lightning/cli.py``."""

import sys

from grasp_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
