"""What `jr-onnx gate --init` writes."""

TEMPLATE = """\
# What `jr-onnx gate` holds models to. Paths are relative to this file; docs/gate.md says more.

[[models]]
name = "net"                      # how reports call it
original = "model.onnx"
hardened = "model.jr.onnx"        # of a model alone: model = "model.onnx" instead of the two
# gates.max_size = "20 MB"        # any table below may be set for one model only, too

[data]
path = "test.npz"                 # .npz, .parquet, .csv, or a folder of class folders
samples = 200                     # drawn by the seed; more narrow the intervals
# preprocess = "preprocess.toml"  # how pictures become examples
# mean = [0.485, 0.456, 0.406]    # what comes before the model, in units of x
# std = [0.229, 0.224, 0.225]

[threat]                          # in units of x, before mean and std
norm = "linf"                     # linf, l2, l1
bounds = [0, 1]
epsilon = "8/255"

[evaluation]
suite = "adaptive"                # only this one sees gradient masking
seed = 0
device = "auto"                   # auto, cpu, cuda
# output = "logits"               # of a model with several outputs

[gates]                           # what is left out is not checked
max_clean_accuracy_drop = 0.03    # JR001: upper end of the 95% interval
# min_robust_accuracy = 0.3       # JR002: lower end of the 95% interval of the worst case
min_adaptive_gain = 0.0           # JR003: lower end; -0.02 allows a loss of 2 points
masking = "fail"                  # JR004: or "warn"
verify_equivalent = true          # JR009
all_sites_retrofitted = true      # JR010
# max_latency_ratio = 1.5         # JR011
# min_opset = 13                  # JR012
# max_opset = 21
# max_size = "10 MB"              # JR013
# max_size_ratio = 1.05

# [baseline]                      # JR014: an earlier result of jr-onnx gate --json
# file = "gate-baseline.json"
# max_clean_accuracy_drop = 0.01
# max_robust_accuracy_drop = 0.01
"""
