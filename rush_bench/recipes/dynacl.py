"""DynACL: ACL with augmentations that anneal, a momentum encoder, and pseudo-labels after it (Luo et al. 2023; S2.12)."""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rush_bench.datasets.views import Interpolation, SimCLRViews, pad_crop
from rush_bench.errors import BadInput
from rush_bench.features import outputs
from rush_bench.networks import route, routed
from rush_bench.networks.routes import CARRIED
from rush_bench.recipes import digits
from rush_bench.recipes.acl import ATTACKED, CLEAN, ACLPretrainSettings, ACLStage
from rush_bench.settings import Count, NonNegative, Several, Share, Whole
from rush_bench.training import protocols
from rush_bench.training.aff import AFF, AFFSettings
from rush_bench.training.clusters import pseudo_labels
from rush_bench.training.inner import InnerSettings
from rush_bench.training.losses import nt_xent
from rush_bench.training.options import NetworkSettings, Optimisation
from rush_bench.training.protocols import IMAGENET_NORMALISED, LINEAR_RATES, LinearSettings, PretrainedSettings
from rush_bench.training.seeds import seeded
from rush_bench.training.stage import ATTACK_STEP, FORWARD, TRAIN_STEP, Batch, Context, Plan, Recipe, Stage

NAMES = {
    "dynacl": "DynACL: ACL with annealed augmentations and a momentum encoder (Luo et al. 2023)",
    "dynacl_pp": "DynACL++: DynACL, then adversarial training on its own pseudo-labels (Luo et al. 2023)",
}


@dataclass(frozen=True)
class DynACLPretrainSettings(ACLPretrainSettings):
    """ACL's, with bilinear crops."""

    interpolation: Interpolation = "bilinear"
    anneal_every: Count = 50  # epochs between changes of strength and weight
    reweighting: NonNegative = 2 / 3  # how much weight moves from the clean to the attacked loss
    key_momentum: Share = 0.99


@dataclass(frozen=True)
class ProbeSettings(Optimisation):
    """++, first part: a linear head on pseudo-labels."""

    epochs: int = 10
    batch_size: int = 512
    lr: float = 0.01
    schedule: Literal["cosine", "steps"] = "steps"
    weight_decay: float = 1e-4
    clusters: Several = 10  # one alone says nothing of an image
    padding: Whole = 4
    flip: Share = 0.5


@dataclass(frozen=True)
class PlusSettings(AFFSettings):
    """++, second part: TRADES on pseudo-labels, from x' = x (with one route its first gradient is rounding alone)."""

    attack: InnerSettings = field(default_factory=lambda: InnerSettings(start="zero"))
    batch_size: int = 512
    milestones: tuple[float, ...] = (10, 20)
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class DynACLSettings(PretrainedSettings):
    """SLF at the encoder; AFF with both routes, from x' = x (the routes differ, so that its gradient is not zero)."""

    network: NetworkSettings = IMAGENET_NORMALISED
    attack: InnerSettings = field(default_factory=lambda: InnerSettings(steps=5))
    pretrain: DynACLPretrainSettings = field(default_factory=DynACLPretrainSettings)
    plus: bool = False
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    trades: PlusSettings = field(default_factory=PlusSettings)
    finetune: LinearSettings = field(default_factory=LinearSettings)
    aff: AFFSettings = field(default_factory=lambda: AFFSettings(routes=2, attack=InnerSettings(start="zero")))


class DynACLStage(ACLStage):
    """First views go through the query network, which learns; second ones through the key network, its average.

    The key network is the model (the released files are it). Its parameters follow the query's; BatchNorm statistics are
    its own.
    """

    settings: DynACLPretrainSettings

    def __init__(self, context: Context, settings: DynACLPretrainSettings, attack: InnerSettings, clusters: int = 0) -> None:
        super().__init__(context, settings, attack)
        self.settings, self.clusters, self.weight = settings, clusters, 1.0
        self.query = nn.ModuleList([copy.deepcopy(self.encoder), copy.deepcopy(self.projector)])
        self.key = nn.ModuleList([self.encoder, self.projector])
        self.key.requires_grad_(False)

    def parameter_groups(self) -> list[nn.Parameter]:
        return list(self.query.parameters())

    def begin_epoch(self, epoch: int) -> None:
        """s(e) = 1 - floor(e / 50) 50 / 1000 scales jitter and gray; crops from 1 - 0.9 s; w = 1 + 2/3 (1 - s), at most 2.

        (The code counts epochs from 1, by which its w moves one epoch before s does.)
        """
        self.train()
        settings = self.settings
        passed = epoch // settings.anneal_every * settings.anneal_every / settings.epochs
        s = 1 - passed
        self.views = SimCLRViews(
            crop_floor=1 - (1 - settings.crop_floor) * s,
            flip=settings.flip,
            jitter=tuple(s * strength for strength in settings.jitter),  # type: ignore[arg-type]
            jitter_p=s * settings.jitter_p,  # in the code, with the strengths
            gray_p=s * settings.gray_p,
            interpolation=settings.interpolation,
        )
        self.weight = min(1 + passed * settings.reweighting, 2.0)

    def queries(self, a: Tensor, route_index: int) -> Tensor:
        """The query network's projections (B, D) of first views through a route."""
        encoder, projector = self.query
        with self.autocast(), route(self.query, route_index):
            return projector(encoder(a))

    def nt(self, views: Tensor, route_index: int) -> Tensor:
        """NT of queries and keys. No weight of the key network takes a gradient, but its images do: the attack moves both."""
        a, b = views.chunk(2)
        (keys,) = self.embed(route_index, b)
        return nt_xent(self.queries(a, route_index), keys, self.settings.temperature)

    def loss(self, batch: Batch) -> Tensor:
        """((2 - w) NT_clean + w NT_attacked) / 2."""
        views = torch.cat([self.views(batch.images, batch.generator), self.views(batch.images, batch.generator)])
        attacked = self.attack_pair(views, batch)
        return ((2 - self.weight) * self.nt(views, CLEAN) + self.weight * self.nt(attacked, ATTACKED)) / 2

    def backward(self, batch: Batch) -> Tensor:
        """The keys follow the queries of before the optimiser's step, as in the code."""
        loss = super().backward(batch)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), 1 - self.settings.key_momentum)
        return loss

    def finish(self) -> None:
        """Leave both routes and, for ++, clusters of the clean route's features."""
        self.key.requires_grad_(True)
        super().finish()
        if self.clusters:
            self.eval()
            features = outputs(lambda x: self.features(x, CLEAN), self.splits["pretrain"])
            self.carried["pseudo"] = pseudo_labels(features, (self.clusters,), self.seed)


class ProbeStage(Stage):
    """A linear head on pseudo-labels, the encoder frozen in eval()."""

    name = "probe"

    def __init__(self, context: Context, settings: ProbeSettings) -> None:
        super().__init__(context)
        self.settings = settings
        with seeded(self.seed, "probe"):
            self.head = nn.Linear(self.network.head.in_features, settings.clusters)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def parameter_groups(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def begin_epoch(self, epoch: int) -> None:
        self.eval()

    def loss(self, batch: Batch) -> Tensor:
        x = pad_crop(batch.images, batch.generator, self.settings.padding, self.settings.flip)
        with self.autocast(), torch.no_grad():
            features = self.network.encoder(x).float()
        return F.cross_entropy(self.head(features), self.carried["pseudo"][str(self.settings.clusters)][batch.indices])

    def finish(self) -> None:
        self.carried["probe"] = {key: value.clone() for key, value in self.head.state_dict().items()}


class PlusStage(AFF):
    """TRADES on pseudo-labels from the probe's head, which is thrown away afterwards.

    Clean and attacked images take the attacked route alone, and that is the network. What the clean route has is for AFF.
    """

    name = "trades"

    def __init__(self, context: Context, settings: PlusSettings, clusters: int) -> None:
        super().__init__(context, settings)
        self.clusters, self.selection_metric = clusters, None
        with seeded(self.seed, "probe"):
            self.head = nn.Linear(self.network.head.in_features, clusters)

    def prepare(self, fresh: bool) -> None:
        super().prepare(fresh)
        if fresh:
            self.head.load_state_dict(self.carried["probe"])

    def labels(self, batch: Batch) -> Tensor:
        return self.carried["pseudo"][str(self.clusters)][batch.indices]

    def validate(self) -> dict[str, float]:
        return {}

    def finish(self) -> None:
        """Both routes for AFF: the present attacked one, and the other's BatchNorm from pre-training."""
        both = routed(self.network.encoder, 2, place=ATTACKED)
        clean = {key: value for key, value in self.carried[CARRIED].items() if f".sets.{CLEAN}." in key}
        self.carried[CARRIED] = {key: value.clone() for key, value in both.state_dict().items()} | clean


def plans(settings: DynACLSettings) -> list[Plan]:
    """Pre-training, for ++ two stages on pseudo-labels, then a fine-tuning protocol."""
    pretrain, attack, probe, plus = settings.pretrain, settings.attack, settings.probe, settings.trades
    if pretrain.variant != "DS":
        raise BadInput(
            f"DynACL is ACL's variant DS with its momentum encoder; pretrain.variant={pretrain.variant} is not there"
        )
    if settings.plus and (pretrain.route, plus.routes) != (ATTACKED, 1):
        raise BadInput("DynACL++ trains the attacked route alone; leave pretrain.route=1 and trades.routes=1")
    clusters = probe.clusters if settings.plus else 0
    passes = 2 * attack.steps * ATTACK_STEP + 2 * (TRAIN_STEP + FORWARD)  # both views are attacked; queries learn, keys pass
    first = Plan(
        "pretrain", "pretrain", pretrain, lambda context: DynACLStage(context, pretrain, attack, clusters), passes=passes
    )
    plus_stages = [
        Plan("probe", "pretrain", probe, lambda context: ProbeStage(context, probe), passes=FORWARD),
        Plan(
            "trades",
            "pretrain",
            plus,
            lambda context: PlusStage(context, plus, probe.clusters),
            passes=protocols.aff_passes(plus),
        ),
    ]
    return [first, *(plus_stages if settings.plus else []), protocols.finetuning_plan(settings)]


PRESETS = protocols.presets(
    {"pretrain.lr": 1.0}
    | {"trades.epochs": 2, "trades.batch_size": 64, "trades.lr": 0.05, "trades.attack.steps": 2, "trades.milestones": ()}
    | {"probe.epochs": 2, "probe.batch_size": 64, "probe.lr": 0.1, "pretrain.anneal_every": 1},
)
PRESETS["short"] |= {"pretrain.anneal_every": 5, "trades.epochs": 8, "trades.milestones": (4, 6), "probe.epochs": 5}


def make(name: str) -> Recipe:
    """The recipe `dynacl`, or `dynacl_pp` with the two stages after it."""
    settings = DynACLSettings(plus=name == "dynacl_pp")
    return Recipe(
        name,
        settings,
        plans,
        protocols.card,
        PRESETS,
        digits.adapt(name),
        LINEAR_RATES,
        finetuning_settings=protocols.FINETUNING_SETTINGS,
    )
