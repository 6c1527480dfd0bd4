"""torchvision's ResNet at an eighth of its width: keys and forward pass of the published networks, in a file of 0.2 MB."""

import torchvision
from torch import nn

WIDTH = 8  # of the first stage


class Narrow(torchvision.models.ResNet):
    """`blocks` basic blocks by stage; images (B, 3, H, W) -> logits (B, 10). Its stem is for 96 pixels or CIFAR's."""

    def __init__(self, blocks: tuple[int, ...] = (2, 2, 2, 2), stem: str = "cifar", padding: int = 1) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, list(blocks), num_classes=10)
        self.conv1 = nn.Conv2d(3, WIDTH, *((3, 1, padding) if stem == "cifar" else (7, 2, 3)), bias=False)
        self.bn1, self.fc = nn.BatchNorm2d(WIDTH), nn.Linear(8 * WIDTH, 10)
        if stem == "cifar":
            self.maxpool = nn.Identity()

    def _make_layer(self, block: type[nn.Module], planes: int, *rest: object, **more: object) -> nn.Sequential:
        if planes == 64:
            self.inplanes = WIDTH
        return super()._make_layer(block, planes * WIDTH // 64, *rest, **more)
