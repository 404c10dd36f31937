"""The program's entry: ``grasp-lightning``, ``python -m grasp_lightning`` and ``cli.py``."""

from typing import NoReturn

from grasp_lightning.starting import leave_on_interrupt


def main() -> NoReturn:
    """Run the program; Ctrl-C ends it with one line from the first import on."""
    leave_on_interrupt()
    from grasp_lightning.cli import run_program  # noqa: PLC0415

    run_program()


if __name__ == "__main__":
    main()
