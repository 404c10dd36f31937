"""``python -m grasp_lightning``: the program, if its script is not on the path."""

from grasp_lightning.cli import run_program

if __name__ == "__main__":
    run_program()
