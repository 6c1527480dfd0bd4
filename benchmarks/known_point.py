"""The data path, end to end, on a known point: pyautoattack's example network on the first 1,000 CIFAR-10 test images.

    python benchmarks/known_point.py --data-dir DIR        (DIR holds cifar10.npz or torchvision's CIFAR-10)

Expected: exactly 93.70 % clean, 0.00 % under attack at l-inf 8/255. The network is a plain ResNet-18, not a robust one.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

import rush_bench as rb
from rush_bench.attacks.suites import parse_suite

EXPECTED = {"clean": 0.937, "pgd": 0.0}


def network() -> torch.nn.Module:
    """The example ResNet-18, in eval mode: inputs in [0,1], no normalisation."""
    package = importlib.util.find_spec("pyautoattack")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "examples"
    spec = importlib.util.spec_from_file_location("example_resnet", folder / "resnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.ResNet18()
    net.load_state_dict(torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True))
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", default=None, help="results folder, to resume (default: a temporary one)")
    args = parser.parse_args()
    # the point was published on the first thousand, stand-ins included
    images = rb.load_dataset("cifar10", "test", data_dir=args.data_dir, stand_ins=True).take(slice(0, 1000))
    suite = parse_suite("linf8-quick", only=tuple(EXPECTED))
    run = rb.attack([rb.Deterministic(network(), name="example", precision="bfloat16")], suite, images, out=args.out)
    found = {result.labels["attack"]: float(result.frame["correct"].mean()) for result in run.results}
    for column, expected in EXPECTED.items():
        print(f"{column}: {found[column]:.2%} (expected {expected:.2%})")
    sys.exit(any(round(found[column], 4) != expected for column, expected in EXPECTED.items()))


if __name__ == "__main__":
    main()
