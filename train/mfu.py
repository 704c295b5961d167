"""Model FLOPs utilization (MFU): which share of the peak of a run's devices the products of its model take.

As PaLM defines it (https://arxiv.org/abs/2204.02311, section 4.1 and appendix B): observed images per second, waiting
included, times the FLOPs that the model's forward and backward pass need, over the peak. What is computed besides, such
as activations a second time, a teacher or the optimizer, counts as time and not as FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from eval.distributed import Ranks
from eval.flops import model_macs
from vitreuse.config import Config
from vitreuse.cost.measure import device_name
from vitreuse.model.checkpoint import HEADS
from vitreuse.model.plan_weights import TOKEN_PROJECTIONS

TRAINING_FLOPS_PER_MAC = 2 * 3  # a forward pass, and a backward pass of twice its products


class Peak(NamedTuple):
    """TFLOP/s of matrix products without sparsity; None where no tensor core knows the type."""

    bfloat16: float | None
    float16: float | None
    float32: float  # of the CUDA cores

    @property
    def tf32(self) -> float:
        """Of float32 numbers in TF32: by every data sheet half of bfloat16's; where there is neither, float32's."""
        return self.float32 if self.bfloat16 is None else self.bfloat16 / 2


# By the name that the driver gives. NVIDIA's data sheets, https://www.nvidia.com/en-us/data-center/NAME/ and
# .../products/workstations/NAME/, or the architecture's white paper where it is more precise. Where a data sheet gives
# only the number with sparsity, or only that of all GPUs of a machine, it is divided.
PEAK_TFLOPS = {
    "GB200": Peak(2500, 2500, 80),
    "B200": Peak(2250, 2250, 75),
    **dict.fromkeys(("GH200 120GB", "GH200 480GB", "H200", "H100 80GB HBM3"), Peak(989.4, 989.4, 66.9)),  # SXM modules
    **dict.fromkeys(("H200 NVL", "H100 NVL"), Peak(835.5, 835.5, 60)),
    "H100 PCIe": Peak(756, 756, 51.2),
    "L40S": Peak(362.05, 362.05, 91.6),
    "L40": Peak(181.05, 181.05, 90.5),
    "L4": Peak(121, 121, 30.3),
    **dict.fromkeys(("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"), Peak(312, 312, 19.5)),
    "A40": Peak(149.7, 149.7, 37.4),
    "A30": Peak(165, 165, 10.3),
    "A10": Peak(125, 125, 31.2),
    "A10G": Peak(70, 70, 35),
    **dict.fromkeys(("V100-SXM2-16GB", "V100-SXM2-32GB"), Peak(None, 125, 15.7)),
    **dict.fromkeys(("V100-PCIE-16GB", "V100-PCIE-32GB"), Peak(None, 112, 14)),
    "T4": Peak(None, 65, 8.1),
    "RTX PRO 6000 Blackwell Workstation Edition": Peak(503.8, 503.8, 126),
    "RTX 6000 Ada Generation": Peak(364.2, 364.2, 91.1),
    "RTX A6000": Peak(154.8, 154.8, 38.7),
    "RTX A5000": Peak(111.1, 111.1, 27.8),
    "RTX A4000": Peak(76.7, 76.7, 19.2),
}


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a device, by what its maker calls it, at its peak in a precision or tf32; None where it is not known.

    So it is of a CPU or a slice of a GPU.
    """
    peak = PEAK_TFLOPS.get(name.removeprefix("NVIDIA ").removeprefix("Tesla "))
    tflops = None if peak is None else getattr(peak, precision)
    return None if tflops is None else 1e12 * tflops


class Mfu:
    """The model FLOPs utilization of one experiment and its model; all ranks have the device of this one."""

    def __init__(self, config: Config, model: nn.Module, ranks: Ranks):
        self.config = config
        precision = config.train.precision
        products = "tf32" if precision == "float32" and config.train.tf32 else precision
        peak = peak_flops(device_name(ranks.device), products)
        self.peak = None if peak is None or not _trains_all_products(model) else peak * ranks.world_size
        self._flops_by_size: dict[tuple[int, int], int] = {}

    def percent(self, num_images: Mapping[Any, int], seconds: float) -> float | None:
        """MFU in percent, by how many images of each size, (rows, columns) in pixels, all ranks have trained on.

        None where the peak is not known, weights are frozen, or the products cannot be counted.
        """
        if self.peak is None:
            return None
        try:
            flops = sum(number * self._flops(size) for size, number in num_images.items())
        except ValueError:  # a part without a closed form, such as an attention pool
            return None
        return 100 * flops / (seconds * self.peak)

    def _flops(self, size: tuple[int, int]) -> int:
        """FLOPs of training on one image of a size."""
        if size not in self._flops_by_size:
            macs = model_macs(self._model, theoretical=True, image_size=size)
            self._flops_by_size[size] = TRAINING_FLOPS_PER_MAC * macs
        return self._flops_by_size[size]

    @cached_property
    def _model(self) -> nn.Module:
        """A second model, without memory, to count on: the trained one may be compiled or spread over ranks."""
        return self.config.model.create("meta")


def _trains_all_products(model: nn.Module) -> bool:
    """Whether all matrices that a model multiplies by are trained: frozen ones have a shorter backward pass.

    Its head may be frozen, as it is where no label is read: it is a small part of the products.
    """
    return all(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name.endswith(("weight", *TOKEN_PROJECTIONS)) and not name.startswith(HEADS)
    )
