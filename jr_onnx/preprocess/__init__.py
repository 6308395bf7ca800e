"""From a picture to what the model sees.

image file --decode, resize, crop, order, layout, scale--> x in pixel units --attack--> x_adv
                                                                  |
                                            model input = (x - mean) / std, inside the graph
"""

from jr_onnx.preprocess.normalized import normalized
from jr_onnx.preprocess.preprocessing import (
    INTERPOLATIONS,
    Preprocessing,
    parse_numbers,
    parse_size,
)
from jr_onnx.preprocess.sources import METADATA_KEY, load_preprocessing, preprocessing_for

__all__ = [
    "INTERPOLATIONS",
    "METADATA_KEY",
    "Preprocessing",
    "load_preprocessing",
    "normalized",
    "parse_numbers",
    "parse_size",
    "preprocessing_for",
]
