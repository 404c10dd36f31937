"""Launcher of the program in a checkout; the program itself is ``grasp_lightning/cli.py``."""

from grasp_lightning.__main__ import main

if __name__ == "__main__":
    main()
