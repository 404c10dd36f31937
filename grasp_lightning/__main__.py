"""``python -m grasp_lightning``: the program, where its script is not at hand."""

from grasp_lightning.cli import run_program

if __name__ == "__main__":
    run_program()
