"""Networks: ResNets, wide and pre-activation ones too, behind one `Classifier` (images in [0,1] in, logits out).

`build({"name": "resnet18", "classes": 10, "channels": 3, "size": 32})` makes one; the resolved spec is plain values
and is stored in the model card, so that the same network can be built again to take the weights.
"""

from rush_bench.networks.classifier import Classifier, build
from rush_bench.networks.routes import route, routed, routes, set_route, single_route
from rush_bench.networks.specs import NETWORKS, resolve

__all__ = ["NETWORKS", "Classifier", "build", "resolve", "route", "routed", "routes", "set_route", "single_route"]
