"""Measurements: what the kernels compile to, and tritium beside other programs. Imports anything, is imported by nothing."""

if "." not in __name__:
    raise ImportError(
        "this folder is part of the package 'tritium': write 'import tritium.bench', not 'import bench'"
    )
