"""Devices that are not here, as far as their limits matter."""

from __future__ import annotations

import torch


class WithoutFloat64(torch.Tensor):
    """A tensor that refuses float64 as Apple's GPUs do, until it is taken to the CPU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].clone()
        if func is torch.Tensor.double or any(x is torch.float64 for x in (*args, *(kwargs or {}).values())):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return super().__torch_function__(func, types, args, kwargs or {})
