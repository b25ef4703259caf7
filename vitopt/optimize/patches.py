"""The patch embedding as one matrix product over patches laid out as rows, instead of a convolution. Exact."""

import torch
from torch import nn


class PatchProduct(nn.Module):
    """Patches that do not overlap times the kernel of a convolution whose stride is its size."""

    def __init__(self, host: nn.Module):
        super().__init__()
        convolution = host.projection
        self.patch = convolution.kernel_size
        with torch.device("meta"):
            self.projection = nn.Linear(convolution.weight[0].numel(), convolution.out_channels)
        self.projection.weight = nn.Parameter(convolution.weight.data.flatten(1), requires_grad=False)
        self.projection.bias = convolution.bias

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, channels, height, width). Returns (batch, patches, width of the model)."""
        batch, channels, height, width = pixel_values.shape
        rows, columns = height // self.patch[0], width // self.patch[1]
        patches = pixel_values.view(batch, channels, rows, self.patch[0], columns, self.patch[1])
        # (batch, rows, columns, channels, patch height, patch width)
        return self.projection(patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1))


def multiply_patches(model: nn.Module) -> int:
    """Replace, in place, every patch embedding that is a plain convolution; how many were."""
    hosts = [name for name, module in model.named_modules() if _can_multiply(module)]
    for name in hosts:
        host = model.get_submodule(name)
        product = PatchProduct(host)
        for told in ("num_patches", "image_size", "patch_size", "num_channels", "patch_shape"):
            if hasattr(host, told):  # what the rest of the model asks of it
                setattr(product, told, getattr(host, told))
        model.set_submodule(name, product)
    return len(hosts)


def _can_multiply(host: nn.Module) -> bool:
    convolution = getattr(host, "projection", None)
    return (
        type(host).__name__ in ("ViTPatchEmbeddings", "DeiTPatchEmbeddings", "ViTMSNPatchEmbeddings")
        and isinstance(convolution, nn.Conv2d)
        and convolution.kernel_size == convolution.stride
        and convolution.bias is not None
    )
