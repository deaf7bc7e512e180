"""A network of one hidden layer, in numpy: from states and a text's logits to a probe's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gatedwarmth.router.storage import check_array

NAMES = ("in_weight", "in_bias", "out_weight", "out_bias")


@dataclass(frozen=True)
class Network:
    """relu(x @ in_weight + in_bias) @ out_weight + out_bias.

    Float32: in_weight [inputs, units], in_bias [units], out_weight [units, outputs], out_bias [outputs].
    """

    in_weight: np.ndarray
    in_bias: np.ndarray
    out_weight: np.ndarray
    out_bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[n, inputs] → float64 [n, outputs]. The inner product in float32: one in float64 would copy its weights."""
        inside = np.maximum(x.astype(np.float32) @ self.in_weight + self.in_bias, 0.0)
        return np.asarray(inside @ self.out_weight + self.out_bias, dtype=np.float64)

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], inputs: int, outputs: int) -> Network:
        """Float32 arrays by their names, which must fit each other and be finite.

        Raises
        ------
        RouterError: another shape, NaN or infinity. KeyError: an array is missing.
        """
        units = tensors["in_bias"].size
        shapes = ((inputs, units), (units,), (units, outputs), (outputs,))
        return cls(*(check_array(name, tensors[name], shape) for name, shape in zip(NAMES, shapes, strict=True)))

    def to_tensors(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(value, dtype=np.float32) for name, value in vars(self).items()}

    def calibrated(self, scale: float, shift: np.ndarray) -> Network:
        """Its outputs times scale, plus shift [outputs]."""
        return dataclasses.replace(self, out_weight=self.out_weight * scale, out_bias=self.out_bias * scale + shift)
