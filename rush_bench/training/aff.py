"""AFF, adversarial full fine-tuning of a pre-trained encoder (sources S1.5), with one BatchNorm route or two (S2.12)."""

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.networks import route, routed
from rush_bench.networks.ensemble import AnyEncoder, trunk
from rush_bench.networks.routes import CARRIED
from rush_bench.settings import NonNegative
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.losses import kl, trades
from rush_bench.training.stage import Batch, Context
from rush_bench.training.supervised import SupervisedSettings, SupervisedStage


@dataclass(frozen=True)
class AFFSettings(SupervisedSettings):
    """Defaults: ACL's train_trades (S2.3), which AdvCL, DynACL and the RobustSSL benchmark share (S1.5)."""

    objective: Literal["trades", "pgd_at"] = "trades"  # pgd_at: Chen 2020b
    beta: NonNegative = 6.0
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(start="gaussian"))
    epochs: int = 25
    batch_size: int = 128
    lr: float = 0.1
    milestones: tuple[float, ...] = (15, 20)
    momentum: float = 0.9
    weight_decay: float = 2e-4
    trained: Literal["all", "last_stage", "head"] = "all"  # ACL's freeze modes by what learns: all, layer4 + fc, fc
    head_init: Literal["default", "zero"] = "zero"
    routes: Literal[1, 2] = 1  # 2: clean images through route 0, attacked ones through route 1 (DynACL)


class AFF(SupervisedStage):
    """TRADES, or PGD-AT, from pre-trained weights; the best epoch is chosen by robust accuracy on the validation split."""

    name = "aff"

    settings: AFFSettings

    def __init__(self, context: Context, settings: AFFSettings) -> None:
        super().__init__(context, settings, settings.attack)
        self.settings, self.encoder = settings, context.network.encoder
        if settings.routes == 2:
            self.encoder = routed(self.encoder, 2, place=1)
        self.head, self.frozen = self.network.head, self.freeze()

    def freeze(self) -> list[nn.Module]:
        """Parts that do not learn; BatchNorm is in eval mode there."""
        parts, encoder = dict(self.encoder.named_children()), cast(AnyEncoder, self.network.encoder)
        names = {"all": [], "head": list(parts), "last_stage": trunk(encoder)}[self.settings.trained]
        frozen = [parts[name] for name in names]
        for part in frozen:
            part.requires_grad_(False)
        return frozen

    def prepare(self, fresh: bool) -> None:
        if not fresh:
            return
        if self.settings.head_init == "zero":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if self.settings.routes == 2:
            self.encoder.load_state_dict(self.carried[CARRIED])

    def begin_epoch(self, epoch: int) -> None:
        self.train()
        for part in self.frozen:
            part.eval()

    def route_logits(self, x: Tensor, route_index: int) -> Tensor:
        """Logits (B, K) in float32 through a route."""
        with self.autocast(), route(self.encoder, route_index if self.settings.routes == 2 else 0):
            return self.head(self.encoder(x)).float()

    def labels(self, batch: Batch) -> Tensor:
        """What the images are to be called: int64 (B,)."""
        return batch.labels

    def loss(self, batch: Batch) -> Tensor:
        x, y, inner = self.inputs(batch), self.labels(batch), self.settings.attack
        if self.settings.objective == "pgd_at":  # Madry et al. 2018, eq. 2.1
            attacked = inner.run(self, lambda v: F.cross_entropy(self.route_logits(v, 1), y), x, batch.generator)
            return F.cross_entropy(self.route_logits(attacked, 1), y)
        with attack_mode(self, inner.mode), torch.no_grad():
            target = self.route_logits(x, 0)
        attacked = inner.run(self, lambda v: kl(target, self.route_logits(v, 1)).sum(), x, batch.generator)
        # Zhang et al. 2019, eq. 5; two forward passes in train(), each a BatchNorm batch of its own, as in the code
        return trades(self.route_logits(x, 0), self.route_logits(attacked, 1), y, self.settings.beta)
