"""Evaluation data: a file or folder -> examples in raw input units, labels, bounds.

npz, parquet, class folders, labels CSV  --load_data-->  Dataset  --batches-->  (x, y), (x, y), ...
"""

from jr_onnx.data.dataset import Dataset, digest
from jr_onnx.data.load import load_data, load_npz

__all__ = ["Dataset", "digest", "load_data", "load_npz"]
