"""Launcher of the program in a checkout; the program itself is ``grasp_lightning/cli.py``."""

from grasp_lightning.cli import run_program

if __name__ == "__main__":
    run_program()
