"""Contrastive pre-training through several BatchNorm routes (sources S2.3, S2.4, S2.12)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rush_bench.networks import route, routed, routes
from rush_bench.networks.routes import CARRIED
from rush_bench.training.contrastive import ContrastiveSettings, ContrastiveStage
from rush_bench.training.stage import Context


class RoutedStage(ContrastiveStage):
    """Encoder and projector with `count` routes. `self.network` is route `model_route` throughout: the finished model.

    A projector whose BatchNorm (if it has any) is the same for all inputs is not routed: `routed_projector=False`.
    """

    routed_projector = True

    def __init__(self, context: Context, settings: ContrastiveSettings, count: int, model_route: int) -> None:
        super().__init__(context, settings)
        self.encoder = routed(self.network.encoder, count, model_route)
        if self.routed_projector:
            self.projector = routed(self.projector, count)
        if self.run_settings.compile:
            self.encoder.compile()

    def parameter_groups(self) -> list[nn.Parameter]:
        """All routes of encoder and projector."""
        return [*self.encoder.parameters(), *self.projector.parameters()]

    def features(self, x: Tensor, route_index: int) -> Tensor:
        """f(x) through a route: (B, dim)."""
        with self.autocast(), route(self.encoder, route_index):
            return self.encoder(x)

    def embed(self, route_index: int, *views: Tensor) -> Sequence[Tensor]:
        """g(f(x)) of each view (B, C, H, W) through a route, all views in one BatchNorm batch: (B, D) each."""
        model_route = route_index if routes(self.projector) > 1 else 0
        with self.autocast(), route(self.encoder, route_index), route(self.projector, model_route):
            return self.projector(self.encoder(torch.cat(views))).chunk(len(views))

    def finish(self) -> None:
        """Leave all routes to later stages, of which the network itself has one."""
        self.carried[CARRIED] = {key: value.clone() for key, value in self.encoder.state_dict().items()}
