"""Where images come from.

    images = load_dataset("cifar10", "test", n=1000)     # or "digits", "cifar100", "stl10", "path/to/file.npz", "a/folder"
    images = as_images(pixels, labels)                   # arrays of the user's own
    images = as_data(loader)                             # a Dataset, a DataLoader, (x, y), a name or a path

A new data set is one module in this folder with a literal `NAMES = {"name": "one line"}` and `make(name) -> Source`;
or, from another package, an entry point in the group `rush_bench.datasets` whose value is a `Source`:

    def read(part: str, folder: Path) -> Part | None:    # part is "train", "test" or "unlabelled" (None: has none)
        return Part(pixels, labels, classes, origin=str(folder))

    flowers = Source("flowers", read, size=32)

`load_dataset` does the rest: checks, validation split, subsets, resizing. Augmentations are in `views`.
"""

from rush_bench.datasets.given import as_data
from rush_bench.datasets.images import Images, as_images
from rush_bench.datasets.loading import load_dataset
from rush_bench.datasets.source import Part, Source

__all__ = ["Images", "Part", "Source", "as_data", "as_images", "load_dataset"]
