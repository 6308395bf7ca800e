"""The networks that gradients are checked and timed on, as torch modules and as ONNX.

    name --seeded weights, BatchNorm statistics of random images--> torch module --export--> Model

All take images of 32 x 32 pixels but LeNet, and have 10 classes. The weights are random: neither
speed nor a comparison of two gradients asks for more. No weight requires a gradient.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from train_samples import LeNetLike

import jr_onnx as jr

CLASSES = 10
OPSET = 18


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut: `relu(x' + conv(relu(conv(x))))`, each with BatchNorm."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(before, channels, 3, stride),
            nn.ReLU(inplace=True),
            *_conv(channels, channels, 3),
        )
        same = stride == 1 and before == channels
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_conv(before, channels, 1, stride))
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, before, h, w)` to `(batch, channels, h / stride, w / stride)`."""
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR: a stem, three stages of three blocks (He et al., arXiv:1512.03385)."""
    layers: list[nn.Module] = [*_conv(3, 16, 3), nn.ReLU(inplace=True)]
    before = 16
    for channels in (16, 32, 64):
        for block in range(3):
            layers.append(BasicBlock(before, channels, 2 if block == 0 and channels > 16 else 1))
            before = channels
    return nn.Sequential(*layers, *_head(before))


class InvertedResidual(nn.Module):
    """1 x 1 to more channels, 3 x 3 on each channel by itself, 1 x 1 back, and a shortcut."""

    def __init__(self, before: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        widened = [*_conv(before, wide, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        self.body = nn.Sequential(
            *widened,
            *_conv(wide, wide, 3, stride, groups=wide),
            nn.ReLU6(inplace=True),
            *_conv(wide, channels, 1),
        )
        self.residual = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, before, h, w)` to `(batch, channels, h / stride, w / stride)`."""
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with the strides that suit 32 x 32 pixels (Sandler et al., arXiv:1801.04381)."""
    layers: list[nn.Module] = [*_conv(3, 32, 3), nn.ReLU6(inplace=True)]
    before = 32
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, channels, repeats, first in settings:
        for stride in (first, *[1] * (repeats - 1)):
            layers.append(InvertedResidual(before, channels, stride, expansion))
            before = channels
    return nn.Sequential(*layers, *_conv(before, 1280, 1), nn.ReLU6(inplace=True), *_head(1280))


def vgg11() -> nn.Module:
    """VGG-11 without BatchNorm, one linear layer at the end (Simonyan et al., arXiv:1409.1556)."""
    layers: list[nn.Module] = []
    before = 3
    for channels in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if channels:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, CLASSES))


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, LayerNorm before each, a shortcut around each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, tokens, width)` to the same shape."""
        tokens, width = x.shape[1], x.shape[2]
        qkv = self.qkv(self.before_attention(x))
        parts = qkv.reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        shares = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        mixed = (shares @ v).transpose(1, 2).reshape(-1, tokens, width)
        x = x + self.projection(mixed)
        y: Tensor = x + self.mlp(self.before_mlp(x))
        return y


class VisionTransformer(nn.Module):
    """A small ViT: patches of 4 x 4 pixels, 6 blocks (Dosovitskiy et al., arXiv:2010.11929)."""

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, 3, 32, 32)` to logits `(batch, 10)`."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


@dataclass(frozen=True)
class Architecture:
    """A network.

    Attributes:
        make: builds it, its weights drawn from torch's generator.
        image: the shape of one example.
    """

    make: Callable[[], nn.Module]
    image: tuple[int, int, int] = (3, 32, 32)


ARCHITECTURES = {
    "LeNet": Architecture(LeNetLike, (1, 28, 28)),
    "ResNet-20": Architecture(resnet20),
    "MobileNetV2": Architecture(mobilenet_v2),
    "VGG-11": Architecture(vgg11),
    "ViT": Architecture(VisionTransformer),
}


def network(name: str, *, seed: int = 0) -> nn.Module:
    """Returns a network of `ARCHITECTURES` in evaluation mode, its weights frozen."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = architecture.make()
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                # Keeps the variance of what passes a Relu; torch's default lets it fade away.
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # what this batch has
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.2)
        with torch.no_grad():
            module.train()(torch.rand(64, *architecture.image))
    return module.eval().requires_grad_(False)


def exported(module: nn.Module, image: tuple[int, int, int], *, dynamo: bool = False) -> jr.Model:
    """Returns a module as ONNX, the batch symbolic.

    Args:
        module: in evaluation mode.
        image: the shape of one example.
        dynamo: by torch.export, or else by TorchScript.
    """
    buffer: Any = io.BytesIO()  # which the exporter takes, its annotation says otherwise
    example = (torch.rand(2, *image),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(
                module, example, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            assert program is not None
            return jr.Model(program.model_proto.SerializeToString())
        torch.onnx.export(
            module, example, buffer, dynamo=False, opset_version=OPSET, input_names=["x"],
            output_names=["logits"], dynamic_axes={"x": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
    return jr.Model(buffer.getvalue())


def loss_and_gradient(
    module: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the cross entropy of each example and the gradient of their sum for x."""
    x = x.detach().requires_grad_(True)
    losses = functional.cross_entropy(module(x), y, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), gradient


def _conv(
    before: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """A convolution that keeps the size but for the stride, and its BatchNorm."""
    conv = nn.Conv2d(
        before, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return conv, nn.BatchNorm2d(channels)


def _head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
