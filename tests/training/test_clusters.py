"""k-means and pseudo-labels from a file."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from rush_bench.datasets import as_images
from rush_bench.defenses.published import import_checkpoint
from rush_bench.errors import BadInput
from rush_bench.training.clusters import kmeans, pseudo_labels, read_pseudo_labels


def blobs(count: int = 4, each: int = 25, spread: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count, 6, generator=generator)
    truth = torch.arange(count).repeat_interleave(each)
    return centres[truth] + spread * torch.randn(count * each, 6, generator=generator), truth


def inertia(points: torch.Tensor, label: torch.Tensor) -> float:
    return sum(float((points[label == k] - points[label == k].mean(0)).square().sum()) for k in label.unique())


@pytest.mark.parametrize("seed", range(5))
def test_finds_separated_groups(seed):
    points, truth = blobs()
    label = kmeans(points, 4, seed)
    assert len({(int(a), int(b)) for a, b in zip(label, truth, strict=True)}) == 4


def test_as_good_as_sklearn_on_a_cloud():
    points = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    ours = min(inertia(points, kmeans(points, 8, seed)) for seed in range(5))
    theirs = KMeans(8, n_init=5, random_state=0).fit(points.numpy()).inertia_
    assert ours <= 1.03 * theirs


def test_every_point_is_with_its_nearest_centre_and_no_cluster_is_empty():
    points = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    label = kmeans(points, 5, 0)
    centres = torch.stack([points[label == k].mean(0) for k in range(5)])
    assert torch.equal(torch.cdist(points, centres).argmin(1), label)
    assert torch.equal(label, kmeans(points, 5, 0)) and not torch.equal(label, kmeans(points, 5, 1))


def test_equal_points_and_as_many_clusters_as_points():
    assert kmeans(torch.zeros(5, 2), 3, 0).shape == (5,)
    assert len(kmeans(torch.eye(4), 4, 0).unique()) == 4
    with pytest.raises(BadInput, match="5 clusters of 4 images"):
        kmeans(torch.eye(4), 5, 0)


def test_pseudo_labels_have_a_clustering_for_each_count():
    points, _ = blobs()
    labels = pseudo_labels(points, (2, 4), 0)
    assert {key: int(value.max()) for key, value in labels.items()} == {"2": 1, "4": 3}


def subset():
    images = as_images(np.zeros((10, 1, 4, 4), np.uint8), np.zeros(10, np.int64), classes=["0"])
    return images.take([7, 2, 5])


def test_a_file_is_read_by_official_position(tmp_path):
    np.savez(tmp_path / "labels.npz", pseudo_train_20=np.arange(10, dtype=np.int32), pseudo_test_20=np.arange(3))
    labels = read_pseudo_labels(tmp_path / "labels.npz", (20,), subset(), least=10, most=10)
    assert labels["20"].tolist() == [7, 2, 5] and labels["20"].dtype == torch.int64


@pytest.mark.parametrize(("count", "fine"), [(7, False), (8, True), (1000, True)])
def test_a_subset_does_not_know_how_long_the_split_is(tmp_path, count, fine):
    """Image 7 is the last at hand: a file needs a label for it, and may have any number more."""
    np.savez(tmp_path / "labels.npz", pseudo_train_20=np.arange(count) % 20)
    if fine:
        assert len(read_pseudo_labels(tmp_path / "labels.npz", (20,), subset(), least=8, most=None)["20"]) == 3
    else:
        with pytest.raises(BadInput, match="needs one integer for each of its 8 or more training images"):
            read_pseudo_labels(tmp_path / "labels.npz", (20,), subset(), least=8, most=None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pseudo_train_20": np.arange(9)}, r"shape \(9,\); mine needs one integer for each of its 10"),
        ({"pseudo_train_20": np.arange(10.0)}, "float64 of shape"),
        ({"pseudo_train_10": np.arange(10)}, "no array 'pseudo_train_20'; it has pseudo_train_10"),
        ({"pseudo_train_20": np.arange(12, 22)}, "label 20 for image 8; give 0 to 19"),
    ],
)
def test_a_wrong_file(tmp_path, arrays, message):
    np.savez(tmp_path / "labels.npz", **arrays)
    with pytest.raises(BadInput, match=message):
        read_pseudo_labels(tmp_path / "labels.npz", (20,), subset(), least=10, most=10)


def test_no_file_and_no_pickles(tmp_path):
    np.save(tmp_path / "a.npz", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "junk.npz").write_bytes(b"labels: 1, 2, 3")
    np.savez(tmp_path / "objects.npz", pseudo_train_20=np.array([{}] * 10, dtype=object))
    for name, why in (
        ("a.npz.npy", "it is no .npz file of plain arrays"),
        ("cut.npz", "it is no .npz file of plain arrays"),
        ("junk.npz", "it is no .npz file of plain arrays"),
        ("objects.npz", "it is no .npz file of plain arrays"),
        ("none.npz", "No such file"),
    ):
        with pytest.raises(BadInput, match=f"cannot be read: {why}") as error:
            read_pseudo_labels(tmp_path / name, (20,), subset(), least=10, most=10)
        assert "allow_pickle" not in str(error.value)


def test_pickled_labels_are_refused_with_the_lines_that_convert_them(tmp_path):
    """AdvCL ships a pickle of arrays; the lines of the error make of it the file that is read."""
    file, images = tmp_path / "cifar10_pseudo_labels.pkl", subset()
    labels = {f"pseudo_train_{count}": np.arange(10, dtype=np.int32) % count for count in (2, 10)}
    file.write_bytes(pickle.dumps(labels | {"pseudo_test_2": np.zeros(3, np.int32)}))
    with pytest.raises(BadInput, match="is a pickle") as caught:
        read_pseudo_labels(file, (2, 10), images, 10, 10)
    with pytest.raises(BadInput, match="is a pickle"):
        import_checkpoint(file, "mine", dataset="cifar10", store=tmp_path / "models")
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2
    subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in lines)], cwd=tmp_path, check=True)
    found = read_pseudo_labels(tmp_path / "labels.npz", (2, 10), images, 10, 10)
    assert found["10"].tolist() == images.index.tolist() and found["2"].tolist() == (images.index % 2).tolist()
