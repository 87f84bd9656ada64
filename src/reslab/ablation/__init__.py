"""Ablations: arms and seeds in, paired differences with intervals and a verdict out."""
