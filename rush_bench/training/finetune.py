"""Linear fine-tuning of a pre-trained encoder: SLF, ALF, and NSLF with its BatchNorm switch (sources S1.5, S2.1).

AFF, which trains all weights, is in `aff.py`; `protocols.py` chooses.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets.views import pad_crop
from rush_bench.errors import BadInput
from rush_bench.features import outputs
from rush_bench.noise import noise_from
from rush_bench.settings import Positive, Share, Whole
from rush_bench.training.inner import InnerSettings, attack_mode
from rush_bench.training.losses import kl, trades
from rush_bench.training.options import Optimisation
from rush_bench.training.stage import Batch, Context, Stage
from rush_bench.training.validation import accuracy, evenly_spaced, robust_accuracy

BNAdapt = Literal["none", "beta", "affine", "stats", "beta_stats"]


@dataclass(frozen=True)
class FinetuneSettings(Optimisation):
    """Defaults: RUSH appendix B; what it leaves open as in sources S5.19 to S5.22."""

    epochs: int = 25
    batch_size: int = 512
    lr: float = 0.1
    alf_lr: Positive | None = None  # ALF's, where it is another
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 2e-4
    noisy: bool = True  # draw the run's noise law here (eq. 12); without a law there is nothing to draw
    bn_adapt: BNAdapt = "none"
    augment: Literal["none", "crop_flip"] = "none"  # none is mentioned (sources S5.20)
    padding: Whole = 4  # of crop_flip
    flip: Share = 0.5
    head_init: Literal["default", "zero"] = "default"  # torch's nn.Linear default; ACL's family starts from zero
    protocol: Literal["SLF", "NSLF", "ALF", "AFF"] = "SLF"  # S1.5; AFF takes the settings of the group `aff`
    alf_loss: Literal["ce", "trades"] = "ce"  # trades: beta 6, DeACL's code, not comparable with other systems' ALF
    attack: InnerSettings = field(default_factory=InnerSettings)  # ALF's, and that of the validation
    select_images: Whole = 0  # validation images attacked after each epoch, to choose the best by robust accuracy (S1.6)


def freeze_except_batchnorm(encoder: nn.Module, bn_adapt: BNAdapt) -> None:
    """Freeze an encoder except for what the switch names (sources S5.21): beta is BatchNorm's bias, affine adds its weight.

    Call `set_batchnorm_mode` at each epoch as well: it decides whether running statistics move.
    """
    encoder.requires_grad_(False)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.requires_grad_(bn_adapt in ("beta", "affine", "beta_stats"))
            module.weight.requires_grad_(bn_adapt == "affine")


def set_batchnorm_mode(encoder: nn.Module, bn_adapt: BNAdapt) -> None:
    """eval() throughout, but BatchNorm in train() where the switch lets the statistics adapt to the (noisy) inputs."""
    encoder.eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(bn_adapt in ("stats", "beta_stats"))


class Finetune(Stage):
    """Cross-entropy of the linear head on (noisy) images; the encoder is frozen up to `bn_adapt`."""

    name = "finetune"

    def __init__(self, context: Context, settings: FinetuneSettings) -> None:
        super().__init__(context)
        self.settings = settings
        noise = noise_from(self.run_settings.noise)
        self.inference_noise = noise if settings.protocol != "ALF" else None  # what the defence adds when it predicts
        self.noise = noise if settings.noisy else None  # what this stage adds when it trains
        # A network that is to predict under noise is judged under noise: an attack without it would say little.
        self.selection_images = settings.select_images if self.inference_noise is None else 0
        self.selection_metric = "noisy" if self.inference_noise is not None else "robust" if self.selection_images else "clean"
        self.encoder_frozen = settings.bn_adapt == "none"
        self.features: dict[str, Tensor] = {}
        if settings.protocol == "AFF":
            raise BadInput("this recipe has no full fine-tuning; use finetune.protocol=SLF, NSLF or ALF")
        if settings.protocol == "ALF" and (self.noise is not None or not self.encoder_frozen):
            raise BadInput("ALF is for a frozen encoder without noise; set finetune.bn_adapt=none and finetune.noisy=false")
        freeze_except_batchnorm(self.network.encoder, settings.bn_adapt)

    def prepare(self, fresh: bool) -> None:
        """A frozen encoder on fixed images gives fixed features: compute them once."""
        if fresh and self.settings.head_init == "zero":
            for weight in self.network.head.parameters():  # those of every member of an ensemble
                nn.init.zeros_(weight)
        if self.encoder_frozen and self.noise is None and self.settings.augment == "none" and self.settings.protocol == "SLF":
            self.eval()
            with self.autocast():
                self.features["train"] = outputs(self.network.encoder, self.splits["train"])

    def begin_epoch(self, epoch: int) -> None:
        """The head in train mode; the encoder as the BatchNorm switch says."""
        self.train()
        set_batchnorm_mode(self.network.encoder, self.settings.bn_adapt)

    def inputs(self, batch: Batch) -> Tensor:
        """The images this stage learns from: augmented if asked, then Q(x) = x + n (Alg. 1 line 11), not clipped."""
        x = batch.images
        if self.settings.augment == "crop_flip":
            x = pad_crop(x, batch.generator, self.settings.padding, self.settings.flip)
        return x if self.noise is None else x + self.noise.sample(x.shape, batch.generator)

    def loss(self, batch: Batch) -> Tensor:
        """CE(phi(f(Q(x))), y): eq. 12, Alg. 1 line 12. ALF: the same at PGD's x', crafted through phi and f."""
        if self.settings.protocol == "ALF":
            return self.adversarial_loss(batch)
        if "train" in self.features:
            features = self.features["train"][batch.indices]
        else:
            trains_encoder = self.settings.bn_adapt in ("beta", "affine", "beta_stats")
            with self.autocast(), torch.set_grad_enabled(trains_encoder):
                features = self.network.encoder(self.inputs(batch)).float()
        return F.cross_entropy(self.network.head(features), batch.labels)

    def adversarial_loss(self, batch: Batch) -> Tensor:
        """CE(phi(f(x')), y), x' maximising it (S1.5: ALF); with `alf_loss=trades`, TRADES with the encoder frozen."""
        x, y, inner = self.inputs(batch), batch.labels, self.settings.attack

        def logits(v: Tensor) -> Tensor:
            with self.autocast():
                return self.network(v).float()

        if self.settings.alf_loss == "ce":
            attacked = inner.run(self, lambda v: F.cross_entropy(logits(v), y), x, batch.generator)
            return F.cross_entropy(logits(attacked), y)
        with attack_mode(self, inner.mode), torch.no_grad():
            target = logits(x)
        attacked = inner.run(self, lambda v: kl(target, logits(v)).sum(), x, batch.generator)
        return trades(logits(x), logits(attacked), y, 6.0)

    def validate(self) -> dict[str, float]:
        """`clean` accuracy of the validation split; with a noise law, `noisy`: one fixed draw per image; `robust`."""
        self.eval()
        val, network = self.splits["val"], self.network
        with self.autocast():
            if self.encoder_frozen and "val" not in self.features:
                self.features["val"] = outputs(network.encoder, val)
            logits = network.head(self.features["val"]).float() if self.encoder_frozen else outputs(network, val)
            metrics = {"clean": accuracy(logits, val.labels)}
            if self.inference_noise is not None:
                metrics["noisy"] = accuracy(outputs(network, val, self.inference_noise, self.seed), val.labels)
            if self.selection_images:
                subset = evenly_spaced(val, self.selection_images)
                metrics["robust"] = robust_accuracy(network, subset, self.settings.attack, self.seed)
        return metrics
