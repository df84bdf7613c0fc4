"""The four ways in which optimizers keep master weights; made from tensors and plain values, without an engine."""
