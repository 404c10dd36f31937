"""Replaces the values of parameters, and keeps the structure of the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.operations.base import Applier, Site, register
from grasp_lightning.models.sharding import copy_into
from grasp_lightning.plan import SetWeights


class Set(Applier[SetWeights]):
    """Its tensors: ``<module>.<parameter>``, as the module itself stores the parameter."""

    operation = SetWeights
    verb = "sets weights of"
    noun = "weight"

    def check(self, operation: SetWeights, site: Site) -> None:
        """Check that the module remains and has the parameters, in floating point."""
        module, names = operation.module, operation.parameters
        index = site.view.layer_of(module)
        if index in set(site.view.layer_indices) - site.left:
            raise PlanError(f"the plan sets weights of {module} after dropping its decoder layer")
        if not names or len(set(names)) != len(names):
            raise PlanError(
                f"the plan sets weights of {module}: expected names of its parameters, each once, "
                f"got {list(names)}"
            )
        for name, parameter in self.own_tensors(operation, site.view).items():
            if name.rpartition(".")[0] in site.replaced:
                raise PlanError(f"the plan sets {name} after replacing the linear that it is in")
            if not parameter.is_floating_point():
                raise PlanError(f"{name} must be floating point, got {parameter.dtype}")

    def own_tensors(self, operation: SetWeights, view: DecoderView) -> dict[str, Tensor]:
        """Return the parameters to set, by the names of their tensors."""
        try:
            known = dict(view.module(operation.module).named_parameters())
        except ModelError as error:
            raise PlanError(f"the plan sets weights of {operation.module}: {error}") from error
        for name in operation.parameters:
            if name not in known:
                raise PlanError(
                    f"the plan sets {operation.module}.{name}: that module has the parameters "
                    f"{', '.join(known)}"
                )
        return {f"{operation.module}.{name}": known[name] for name in operation.parameters}

    def apply(
        self, view: DecoderView, operation: SetWeights, tensors: Mapping[str, Tensor]
    ) -> None:
        """Copy the values into the parameters."""
        with torch.no_grad():
            for name, parameter in self.own_tensors(operation, view).items():
                copy_into(parameter, tensors[name])


register(Set())
