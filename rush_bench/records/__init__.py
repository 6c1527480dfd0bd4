"""Records: what a measurement leaves on disk, and all that a table is made from (protocol 8). numpy and pandas, no torch.

A cell is one (defence, attack, threat, images, seed). It is worked off in fixed chunks of images, one file per chunk:

    <results>/runs/<first 16 digits of the key>/
        cell.json               the identity, hashed to the key, and labels for people
        chunk-0003.npz          per-image arrays of the chunk's images; whose chunk it is, and the checksum of its x'
        adversarial-0003.npy    the stored x', float32 (n, C, H, W)

A chunk is done when its npz is there (written last, by rename) and the x' beside it, if any, is the one it was counted on:
two processes whose x' differ in a bit leave a chunk that the next run makes again. A kill at any moment loses at most the
chunk at work. Records that were published without their x' are whole: the counts stand on their own.
"""

from rush_bench.records.cells import FORMAT as FORMAT
from rush_bench.records.cells import Cell as Cell
from rush_bench.records.chunks import TOLERANCE as TOLERANCE
from rush_bench.records.chunks import Arrays as Arrays
from rush_bench.records.results import CellResult as CellResult
from rush_bench.records.results import load_results as load_results
from rush_bench.records.results import save_indexes as save_indexes
from rush_bench.records.sharing import CellStore as CellStore
