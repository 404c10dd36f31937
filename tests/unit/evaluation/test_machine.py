import os

import torch

from grasp_lightning.evaluation.machine import describe_machine


def test_the_machine_is_reported_with_the_threads_that_are_set() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        machine = describe_machine(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert (machine.device, machine.threads, machine.cores) == ("cpu", 2, os.cpu_count())
    assert machine.device_name
    assert machine.versions.keys() == {"grasp_lightning", "python", "torch", "transformers"}
    assert machine.versions["torch"] == torch.__version__
    assert machine.to_dict()["versions"] == machine.versions
